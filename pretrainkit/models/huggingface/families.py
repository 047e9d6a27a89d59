"""The transformers architectures we can write: what each computes, what its config says, how its weights are named.

A new architecture is one entry in FAMILIES, and a function in settings.py when its keys are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pretrainkit.errors import ModelError
from pretrainkit.models.huggingface import settings
from pretrainkit.models.huggingface.facts import PLAIN, Facts, architecture_facts

if TYPE_CHECKING:
    from litgpt import Config

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_TOP = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
_LLAMA_BLOCK: Mapping[str, str | tuple[str, ...]] = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.qkv": _QKV,
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_MIXTRAL_BLOCK = {
    **_LLAMA_BLOCK,
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.{}.fc_1": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.{}.fc_2": "block_sparse_moe.experts.{}.w3",
    "mlp.experts.{}.proj": "block_sparse_moe.experts.{}.w2",
}
_QWEN3_MOE_BLOCK = {
    **_LLAMA_BLOCK,
    "mlp.gate": "mlp.gate",
    "mlp.experts.{}.fc_1": "mlp.experts.{}.gate_proj",
    "mlp.experts.{}.fc_2": "mlp.experts.{}.up_proj",
    "mlp.experts.{}.proj": "mlp.experts.{}.down_proj",
}
_OLMO2_BLOCK = {
    **_LLAMA_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_GEMMA2_BLOCK = {
    **_OLMO2_BLOCK,
    "norm_2": "pre_feedforward_layernorm",
}
_PHI3_BLOCK = {
    **_LLAMA_BLOCK,
    "attn.qkv": "self_attn.qkv_proj",
    "mlp.fc_1": "mlp.gate_up_proj",
    "mlp.fc_2": "mlp.gate_up_proj",
}
_PHI_TOP = {**_LLAMA_TOP, "transformer.ln_f": "model.final_layernorm"}
_PHI_BLOCK: Mapping[str, str | tuple[str, ...]] = {
    "norm_1": "input_layernorm",
    "attn.qkv": _QKV,
    "attn.proj": "self_attn.dense",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
_NEOX_TOP = {
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
_NEOX_BLOCK = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.proj": "attention.dense",
    "mlp.fc": "mlp.dense_h_to_4h",
    "mlp.proj": "mlp.dense_4h_to_h",
}
_FALCON_TOP = {
    "transformer.wte": "transformer.word_embeddings",
    "transformer.ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
_FALCON_BLOCK = {
    "norm_1": "input_layernorm",
    "attn.qkv": "self_attention.query_key_value",
    "attn.proj": "self_attention.dense",
    "mlp.fc": "mlp.dense_h_to_4h",
    "mlp.proj": "mlp.dense_4h_to_h",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One transformers architecture: what it can compute, what its config says, how its weights are named."""

    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """Class that `AutoModelForCausalLM` takes."""
    settings: Callable[[Config], dict[str, Any]]
    """litgpt config -> the model's part of config.json."""
    allows: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Facts it computes besides `PLAIN`."""
    prefers: tuple[str, ...] = ()
    """Beginnings of names (lower case) that decide for this family among those that compute the same."""
    top: dict[str, str] = field(default_factory=lambda: _LLAMA_TOP)
    """Modules outside the blocks."""
    block: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: _LLAMA_BLOCK)
    """Modules of one block."""
    block_prefix: str = "model.layers.{}"
    """Name of a block."""
    interleaved_qkv: bool = False
    """Rows of the fused projection lie per group (q.. k v, q.. k v) instead of q.., k.., v..."""
    unit_offset: bool = False
    """RMSNorm multiplies by 1 + weight."""


_NEOX_LIKE = {"mlp": ("GptNeoxMLP",), "norm": ("LayerNorm",), "head_size": ("n_embd / n_head",)}
_GEMMA_LIKE = {"mlp": ("GemmaMLP",), "scaled_embeddings": (True,)}
_GEMMA2_LIKE = {
    **_GEMMA_LIKE,
    "norm_positions": ("before and after",),
    "sliding_window": ("none", "some layers", "all layers"),
    "attention_scale": ("head size", "own"),
    "logit_softcap": (False, True),
}
_ANY_ROTARY = ("full", "partial")
_EXPERTS = {"mlp": ("LLaMAMoE",), "experts": ("top-k",)}

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        settings=settings.llama_settings,
        allows={"bias": ("none", "all")},
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        settings=settings.mistral_settings,
        allows={"sliding_window": ("none", "all layers")},
        prefers=("mistral", "mathstral"),
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        settings=settings.qwen_settings,
        allows={"bias": ("qkv",), "sliding_window": ("none", "some layers", "all layers")},
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        settings=settings.qwen_settings,
        allows={"qk_norm": ("per head",), "sliding_window": ("none", "some layers", "all layers")},
    ),
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        settings=settings.phi3_settings,
        allows={
            "rotary": _ANY_ROTARY,
            "rope_scaling": ("none",),
            "sliding_window": ("none", "all layers"),
            "head_size": ("n_embd / n_head",),
        },
        prefers=("phi-3", "phi-4"),
        block=_PHI3_BLOCK,
    ),
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        settings=settings.stablelm_settings,
        allows={
            "norm": ("LayerNorm",),
            "bias": ("none", "qkv"),
            "rotary": _ANY_ROTARY,
            "head_size": ("n_embd / n_head",),
        },
    ),
    Family(
        model_type="olmo",
        architecture="OlmoForCausalLM",
        settings=settings.olmo_settings,
        allows={"norm": ("LayerNorm without weights",), "head_size": ("n_embd / n_head",)},
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        settings=settings.llama_settings,
        allows={"norm_positions": ("after",), "qk_norm": ("whole",)},
        block=_OLMO2_BLOCK,
    ),
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        settings=settings.gemma_settings,
        allows=_GEMMA_LIKE,
        unit_offset=True,
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        settings=settings.gemma2_settings,
        allows={**_GEMMA2_LIKE, "attention_softcap": (False, True)},
        block=_GEMMA2_BLOCK,
        unit_offset=True,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        settings=settings.gemma3_settings,
        allows={**_GEMMA2_LIKE, "qk_norm": ("per head",), "local_rope": (True,)},
        block=_GEMMA2_BLOCK,
        unit_offset=True,
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        settings=settings.mixtral_settings,
        allows={**_EXPERTS, "sliding_window": ("none", "all layers")},
        block=_MIXTRAL_BLOCK,
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        settings=settings.qwen3_moe_settings,
        allows={**_EXPERTS, "qk_norm": ("per head",)},
        block=_QWEN3_MOE_BLOCK,
    ),
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        settings=settings.gpt_neox_settings,
        allows={
            **_NEOX_LIKE,
            "residual": ("parallel", "sequential"),
            "bias": ("all",),
            "rotary": _ANY_ROTARY,
            "key_value_heads": ("all",),
        },
        top=_NEOX_TOP,
        block=_NEOX_BLOCK,
        block_prefix="gpt_neox.layers.{}",
        interleaved_qkv=True,
    ),
    Family(
        model_type="phi",
        architecture="PhiForCausalLM",
        settings=settings.phi_settings,
        allows={
            **_NEOX_LIKE,
            "residual": ("parallel",),
            "shared_norm": (True,),
            "bias": ("all",),
            "lm_head_bias": (True,),
            "rotary": _ANY_ROTARY,
        },
        top=_PHI_TOP,
        block=_PHI_BLOCK,
    ),
    Family(
        model_type="falcon",
        architecture="FalconForCausalLM",
        settings=settings.falcon_settings,
        allows={**_NEOX_LIKE, "residual": ("parallel",), "shared_norm": (True, False)},
        top=_FALCON_TOP,
        block=_FALCON_BLOCK,
        block_prefix="transformer.h.{}",
        interleaved_qkv=True,
    ),
)


def family_of(config: Config) -> Family:
    """The transformers architecture that computes what `config` describes.

    Raises:
        ModelError: There is none; names the nearest one and the facts that it does not have.
    """
    facts = architecture_facts(config)
    fitting = [family for family in FAMILIES if not _obstacles(family, facts)]
    if not fitting:
        nearest = min(FAMILIES, key=lambda family: len(_obstacles(family, facts)))
        obstacles = ", ".join(f"{name}={facts[name]!r}" for name in _obstacles(nearest, facts))
        raise ModelError(
            f"no transformers architecture computes {config.name or 'this model'}: {nearest.architecture} comes "
            f"nearest but has no {obstacles}; the litgpt folder works with litgpt, or train a model without that"
        )
    name = config.name.lower()
    return next((family for family in fitting if family.prefers and name.startswith(family.prefers)), fitting[0])


def _obstacles(family: Family, facts: Facts) -> list[str]:
    allowed = {**PLAIN, **family.allows}
    return [name for name, value in facts.items() if value not in allowed[name]]
