"""Which model: names and keys -> a checked litgpt `Config`.

Comes in: what a user wrote. Goes out: a configuration that can be built. Guarantee: a wrong name, key or value is
refused in one line before any tensor exists.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pretrainkit.errors import ModelError
from pretrainkit.metadata import DatasetInfo
from pretrainkit.models.architectures import Config, configs, name_to_config
from pretrainkit.registry import did_you_mean

# Key -> the most it may be: above any model there is, and below what torch can count the elements of, or list the
# layers of in a minute.
_POSITIVE = {
    "block_size": 10**9,
    "n_layer": 4096,
    "n_embd": 10**6,
    "n_head": 10**5,
    "head_size": 10**5,
    "n_query_groups": 10**5,
    "vocab_size": 2**31 - 1,  # ids are int32 at most
    "padding_multiple": 10**6,
    "padded_vocab_size": 2**31 - 1,
    "intermediate_size": 10**7,
    "moe_intermediate_size": 10**7,
    "sliding_window_size": None,
    "rope_base": None,
    "rope_condense_ratio": None,
}
_EXPERTS = {"n_expert": 10_000, "n_shared_expert": 10_000, "n_expert_per_token": 10_000}
_MOST = {**_POSITIVE, **_EXPERTS}
_ABOVE_ZERO = (
    "norm_eps",
    "attention_scores_scalar",
    "attention_logit_softcapping",
    "final_logit_softcapping",
    "rope_local_base_freq",
    "routed_scaling_factor",
)
_CHOICES = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "norm_qk_type": ("default", "olmo2"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"),
    "gelu_approximate": ("none", "tanh"),
}


def resolve_config(model_name: str | None, model_config: dict[str, Any] | None) -> Config:
    """See `pretrainkit.models.resolve_config`."""
    if model_name is None and not model_config:
        raise ModelError("no model is named; give --model_name (such as pythia-160m) or a model_config block")
    keys = dict(model_config or {})
    _check_keys(keys)
    base = {} if model_name is None else _named(model_name)
    values = {**base, **_without_stale(base, keys)}
    heads = values.get("n_head", Config.n_head)
    groups = values.get("n_query_groups") or heads
    width = values.get("n_embd", Config.n_embd)
    if (width % heads and values.get("head_size") is None) or heads % groups:
        raise ModelError(
            f"model_config: n_embd={width} must be a multiple of n_head={heads}, and that of n_query_groups={groups}"
        )
    try:
        config = Config(**values)
    except (AssertionError, TypeError, ValueError) as error:
        raise ModelError(f"model_config cannot be built: {str(error) or 'its numbers do not fit together'}") from error
    if config.mlp_class_name == "LLaMAMoE" and not 0 < config.n_expert_per_token <= config.n_expert:
        raise ModelError(
            f"model_config.n_expert_per_token={config.n_expert_per_token} is not between 1 and "
            f"n_expert={config.n_expert}"
        )
    if config.mlp_class_name != "LLaMAMoE":
        for key in _EXPERTS:
            if keys.get(key):
                raise ModelError(
                    f"model_config.{key}={keys[key]} does nothing with mlp_class_name={config.mlp_class_name}, which "
                    "has no experts; add mlp_class_name=LLaMAMoE or leave it out"
                )
    return config


def _named(model_name: str) -> dict[str, Any]:
    if model_name in name_to_config:
        return dict(name_to_config[model_name])
    by_hub_name: dict[str, dict[str, Any]] = {}
    for config in configs:
        hub = config["hf_config"]
        by_hub_name.setdefault(hub["name"], config)
        by_hub_name[f"{hub['org']}/{hub['name']}"] = config
    if model_name in by_hub_name:
        return dict(by_hub_name[model_name])
    near = did_you_mean(model_name, [*name_to_config, *by_hub_name]) or ["pythia-160m", "Llama-3.2-1B", "Qwen3-0.6B"]
    raise ModelError(f"unknown model {model_name!r}; did you mean {', '.join(near)}?")


def _without_stale(base: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """The given keys, and None for the named model's derived sizes that they make stale."""
    derived: dict[str, Any] = {}
    if "vocab_size" in keys and "padded_vocab_size" in base and "padded_vocab_size" not in keys:
        derived["padded_vocab_size"] = None
    return {**derived, **keys}


def _check_keys(keys: dict[str, Any]) -> None:
    known = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in keys.items():
        if key not in known:
            near = did_you_mean(key, known) or sorted(known)[:3]
            raise ModelError(f"unknown key model_config.{key}; did you mean {' or '.join(near)}?")
        _check_value(key, value, str(known[key].type))


def _check_value(key: str, value: Any, annotation: str) -> None:
    if value is None:
        if "None" not in annotation:
            raise ModelError(f"model_config.{key} is empty; give a value or leave the key out")
        return
    if key in _CHOICES and value not in _CHOICES[key]:
        near = did_you_mean(str(value), _CHOICES[key]) or list(_CHOICES[key])
        raise ModelError(f"model_config.{key}={value!r} does not exist; did you mean {' or '.join(near)}?")
    if not _has_type(value, annotation):
        kind = annotation.removeprefix("<class '").removesuffix("'>")
        raise ModelError(f"model_config.{key}={value!r} is of the wrong type; expected {kind}")
    if key in _POSITIVE and value < 1:
        raise ModelError(f"model_config.{key}={value} is not positive; give at least 1")
    if (most := _MOST.get(key)) is not None and value > most:
        raise ModelError(f"model_config.{key}={value} is beyond what can be built; give at most {most}")
    if key in _ABOVE_ZERO and not value > 0:
        raise ModelError(f"model_config.{key}={value} must be above 0")
    if key == "rotary_percentage" and not 0 <= value <= 1:
        raise ModelError(f"model_config.{key}={value} must be between 0 and 1")


def _has_type(value: Any, annotation: str) -> bool:
    kind = annotation.removeprefix("<class '").partition("'")[0].partition(" ")[0]
    types: dict[str, Any] = {"bool": bool, "int": int, "float": int | float, "dict": dict, "str": str}
    if isinstance(value, bool):  # Python counts it among the whole numbers
        return kind not in types or kind == "bool"
    return kind not in types or isinstance(value, types[kind])


def check_vocabulary(config: Config, info: DatasetInfo, dataset: str) -> None:
    """See `pretrainkit.models.check_vocabulary`."""
    largest = max(info.max_token_id, info.tokenizer.vocab_size - 1)
    if largest >= config.padded_vocab_size:
        raise ModelError(
            f"{dataset} was made with tokenizer {info.tokenizer.name!r}, whose ids reach {largest}, but "
            f"{config.name or 'the model'} has embeddings for {config.padded_vocab_size}; choose another model, set "
            f"model_config.padded_vocab_size to at least {largest + 1}, or tokenize again with the model's tokenizer"
        )
