"""What a litgpt model computes, as a few facts that can be compared with what a transformers architecture computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt import Config

Facts = dict[str, Any]

# What a family allows unless it says otherwise: the Llama block without any extra.
PLAIN: dict[str, tuple[Any, ...]] = {
    "mlp": ("LLaMAMLP",),
    "norm": ("RMSNorm",),
    "norm_positions": ("before",),
    "residual": ("sequential",),
    "shared_norm": (False,),
    "qk_norm": ("none",),
    "bias": ("none",),
    "lm_head_bias": (False,),
    "head_size": ("n_embd / n_head", "own"),
    "rotary": ("full",),
    "rope_scaling": ("none", "linear", "llama3"),
    "rope_interleave": (False,),
    "local_rope": (False,),
    "sliding_window": ("none",),
    "key_value_heads": ("all", "grouped", "one"),
    "attention_scale": ("head size",),
    "attention_softcap": (False,),
    "logit_softcap": (False,),
    "scaled_embeddings": (False,),
    "gelu": ("none", "tanh"),
    "experts": ("none",),
    "latent_attention": (False,),
}


def architecture_facts(config: Config) -> Facts:
    """What the model computes, in the terms of `PLAIN`."""
    heads = {1: "one", config.n_head: "all"}
    bias = "all" if config.bias else "qkv" if config.attn_bias else "none"
    return {
        "mlp": config.mlp_class_name,
        "norm": "LayerNorm without weights" if _has_bare_norms(config) else config.norm_class_name,
        "norm_positions": _norm_positions(config),
        "residual": "parallel" if config.parallel_residual else "sequential",
        "shared_norm": config.shared_attention_norm,
        "qk_norm": {"default": "per head", "olmo2": "whole"}[config.norm_qk_type] if config.norm_qk else "none",
        "bias": bias,
        "lm_head_bias": config.lm_head_bias,
        "head_size": "n_embd / n_head" if config.head_size * config.n_head == config.n_embd else "own",
        "rotary": _rotary(config),
        "rope_scaling": rope_scaling(config),
        "rope_interleave": config.rope_interleave,
        "local_rope": config.rope_local_base_freq is not None,
        "sliding_window": sliding_window(config),
        "key_value_heads": heads.get(config.n_query_groups, "grouped"),
        "attention_scale": "own" if config.attention_scores_scalar not in (None, config.head_size) else "head size",
        "attention_softcap": config.attention_logit_softcapping is not None,
        "logit_softcap": config.final_logit_softcapping is not None,
        "scaled_embeddings": config.scale_embeddings,
        "gelu": config.gelu_approximate,
        "experts": _experts(config),
        "latent_attention": bool(config.latent_attention),
    }


def _has_bare_norms(config: Config) -> bool:
    # Source: litgpt config.py norm_class - the name decides, so a fact of the model hides in it.
    return config.norm_class_name == "LayerNorm" and "OLMo" in config.name


def _norm_positions(config: Config) -> str:
    before = (config.norm_1, config.norm_2)
    after = (config.post_attention_norm, config.post_mlp_norm)
    known = {
        ((True, True), (False, False)): "before",
        ((True, True), (True, True)): "before and after",
        ((False, False), (True, True)): "after",
    }
    return known.get((before, after), "irregular")


def _rotary(config: Config) -> str:
    if config.rope_n_elem % 2:
        return "an odd part"  # transformers rotates pairs only
    return "full" if config.rope_n_elem == config.head_size else "partial"


def rope_scaling(config: Config) -> str:
    """How positions are stretched: "none", "linear", "llama3", or a way that only litgpt knows."""
    adjustments = config.rope_adjustments or {}
    condensed = config.rope_condense_ratio != 1
    if {"beta_fast", "beta_slow"} & set(adjustments):
        return "yarn"
    if {"low_freq_factor", "high_freq_factor"} & set(adjustments):
        return "llama3 and condensed" if condensed else "llama3"
    if condensed and config.rope_local_base_freq is not None:
        return "condensed local"
    return "linear" if condensed or "factor" in adjustments else "none"


def sliding_window(config: Config) -> str:
    """Which layers see only a window: "none", "some layers" or "all layers"."""
    if config.sliding_window_size is None or config.sliding_window_size >= config.block_size:
        return "none"  # a window as long as the context hides nothing
    indices = config.sliding_window_indices[: config.n_layer]
    return "all layers" if all(indices) else "some layers" if any(indices) else "none"


def _experts(config: Config) -> str:
    if config.mlp_class_name != "LLaMAMoE":
        return "none"
    special = (config.n_shared_expert, config.n_expert_groups, config.first_k_dense_replace)
    return "top-k" if not any(special) and config.routed_scaling_factor == 1.0 else "grouped, shared or scaled"
