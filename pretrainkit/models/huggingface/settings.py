"""The architectures' own keys in `config.json`, from a litgpt configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrainkit.errors import ModelError
from pretrainkit.models.huggingface.facts import rope_scaling, sliding_window

if TYPE_CHECKING:
    from litgpt import Config


def _common(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "max_position_embeddings": config.block_size,
        "rope_theta": config.rope_base,  # what transformers 4 reads; transformers 5 reads rope_parameters
        "rope_parameters": _rope_parameters(config),
    }


def _rope_parameters(config: Config) -> dict[str, Any]:
    adjustments = config.rope_adjustments or {}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    kind = rope_scaling(config)
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": config.rope_condense_ratio * adjustments.get("factor", 1.0)}
    if kind == "llama3":
        parameters |= {
            "rope_type": "llama3",
            "factor": adjustments["factor"],
            "low_freq_factor": adjustments["low_freq_factor"],
            "high_freq_factor": adjustments["high_freq_factor"],
            "original_max_position_embeddings": adjustments["original_max_seq_len"],
        }
    if config.rope_n_elem != config.head_size:
        parameters["partial_rotary_factor"] = config.rotary_percentage
    return parameters


def _rms(config: Config) -> dict[str, Any]:
    return {
        **_common(config),
        "head_dim": config.head_size,  # the other architectures have n_embd / n_head only
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
    }


def _gelu(config: Config) -> str:
    return "gelu_pytorch_tanh" if config.gelu_approximate == "tanh" else "gelu"


def _layer_types(config: Config) -> list[str]:
    indices = config.sliding_window_indices if config.sliding_window_size is not None else [0] * config.n_layer
    return ["sliding_attention" if sliding else "full_attention" for sliding in indices[: config.n_layer]]


def _window(config: Config) -> int | None:
    return config.sliding_window_size if sliding_window(config) != "none" else None


def llama_settings(config: Config) -> dict[str, Any]:
    """Llama, and OLMo-2, whose keys are the same."""
    return {**_rms(config), "attention_bias": config.bias, "mlp_bias": config.bias}


def mistral_settings(config: Config) -> dict[str, Any]:
    """Mistral: Llama with a window in every layer, or in none."""
    return {**_rms(config), "sliding_window": _window(config)}


def qwen_settings(config: Config) -> dict[str, Any]:
    """Qwen 2 and 3: a window in any of the layers."""
    window = _window(config)
    return {
        **_rms(config),
        "attention_bias": False,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.n_layer if window is None else 0,
        "layer_types": ["full_attention"] * config.n_layer if window is None else _layer_types(config),
    }


def phi3_settings(config: Config) -> dict[str, Any]:
    """Phi-3 and Phi-4: part of each head may be rotated."""
    partial = config.rope_n_elem / config.head_size
    original = {"original_max_position_embeddings": config.block_size, "partial_rotary_factor": partial}
    return {**mistral_settings(config), **original}


def stablelm_settings(config: Config) -> dict[str, Any]:
    """StableLM: LayerNorm in place of RMSNorm."""
    return {
        **_common(config),
        "hidden_act": "silu",
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.attn_bias,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": config.rotary_percentage,
    }


def olmo_settings(config: Config) -> dict[str, Any]:
    """OLMo: LayerNorm without weights."""
    if config.norm_eps != 1e-5:  # Source: transformers modeling_olmo.py OlmoLayerNorm - a constant there
        raise ModelError(f"norm_eps={config.norm_eps}: transformers' OLMo has 1e-05 built in; set norm_eps to 1e-05")
    return {**_common(config), "hidden_act": "silu", "attention_bias": False, "clip_qkv": None}


def gemma_settings(config: Config) -> dict[str, Any]:
    """Gemma: scaled embeddings, GELU gate."""
    activation = {"hidden_act": _gelu(config), "hidden_activation": _gelu(config)}
    return {**_rms(config), **activation, "attention_bias": False}


def gemma2_settings(config: Config) -> dict[str, Any]:
    """Gemma 2: norms on both sides, soft caps, its own attention scale."""
    return {
        **gemma_settings(config),
        "query_pre_attn_scalar": config.attention_scores_scalar or config.head_size,
        "attn_logit_softcapping": config.attention_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": config.sliding_window_size or config.block_size,
        "layer_types": _layer_types(config),
    }


def gemma3_settings(config: Config) -> dict[str, Any]:
    """Gemma 3: Gemma 2 with a second rope for the layers that have a window."""
    layer_types = _layer_types(config)
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    local_layers = [
        "sliding_attention" if local else "full_attention" for local in config.rope_indices[: config.n_layer]
    ]
    if local_layers != layer_types:
        raise ModelError(
            "rope_indices and sliding_window_indices differ: transformers' Gemma 3 has its local rope exactly in the "
            "layers with a sliding window; make the two lists equal"
        )
    return {
        **gemma2_settings(config),
        "rope_local_base_freq": config.rope_local_base_freq,
        "rope_parameters": {"full_attention": _rope_parameters(config), "sliding_attention": local},
    }


def mixtral_settings(config: Config) -> dict[str, Any]:
    """Mixtral: experts in place of the MLP."""
    return {
        **mistral_settings(config),
        "intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "num_local_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
    }


def qwen3_moe_settings(config: Config) -> dict[str, Any]:
    """Qwen 3 with experts in every layer."""
    return {
        **_rms(config),
        "attention_bias": False,
        "use_sliding_window": False,
        "moe_intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
        "norm_topk_prob": True,  # litgpt takes the softmax over the chosen experts, which is the same
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def gpt_neox_settings(config: Config) -> dict[str, Any]:
    """GPT-NeoX and Pythia."""
    return {
        **_common(config),
        "hidden_act": _gelu(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": True,
        "rotary_pct": config.rotary_percentage,  # GPT-NeoX's own names for the rope settings
        "rotary_emb_base": config.rope_base,
    }


def phi_settings(config: Config) -> dict[str, Any]:
    """Phi-1.5 and Phi-2."""
    return {
        **_common(config),
        "hidden_act": _gelu(config),
        "layer_norm_eps": config.norm_eps,
        "partial_rotary_factor": config.rotary_percentage,
        "qk_layernorm": False,
    }


def falcon_settings(config: Config) -> dict[str, Any]:
    """Falcon: 7B shares one norm and one key head, the others do not."""
    multi_query = config.shared_attention_norm and config.n_query_groups == 1
    return {
        **_common(config),
        "ffn_hidden_size": config.intermediate_size,
        "activation": _gelu(config),
        "layer_norm_epsilon": config.norm_eps,
        "alibi": False,
        "bias": False,
        "parallel_attn": True,
        "multi_query": multi_query,
        "new_decoder_architecture": not multi_query,
        "num_kv_heads": config.n_query_groups,
        "num_ln_in_parallel_attn": None if multi_query else 1 if config.shared_attention_norm else 2,
    }
