"""Where each litgpt weight goes in a transformers model, and what is done to it on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pretrainkit.errors import ModelError
from pretrainkit.models.huggingface.families import Family, family_of

if TYPE_CHECKING:
    from litgpt import Config

Operation = Literal["copy", "query", "key", "value", "interleave", "concatenate", "add_one", "subtract_one"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor of the Hugging Face folder and how it comes from litgpt's."""

    name: str
    """Name of the tensor in transformers."""
    sources: tuple[str, ...]
    """Names of the litgpt tensors it is made from, in order."""
    operation: Operation
    """What is done to them."""


def plan_weights(config: Config, names: Iterable[str], *, tied: bool) -> list[Target]:
    """Every tensor of the Hugging Face model, block by block; each litgpt tensor in `names` is used exactly once.

    Raises:
        ModelError: A tensor has no place in the architecture.
    """
    family = family_of(config)
    targets: dict[str, Target] = {}
    for name in sorted(names, key=_natural):
        if tied and name == "lm_head.weight":
            continue
        module, _, kind = name.rpartition(".")
        places = _places(family, config, module)
        operations: tuple[Operation, ...] = ("query", "key", "value")
        if len(places) == 1:
            operations = (_single_operation(family, config, module),)
        for place, operation in zip(places, operations, strict=True):
            hf_name = f"{place}.{kind}"
            sources = (*targets[hf_name].sources, name) if hf_name in targets else (name,)
            fused = len(sources) > 1
            targets[hf_name] = Target(name=hf_name, sources=sources, operation="concatenate" if fused else operation)
    return list(targets.values())


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10, fc_1 before fc_2, the embedding first and the head last."""
    first = "0" if name.startswith("transformer.wte") else "2" if name.startswith("lm_head") else "1"
    parts = [first, *re.split(r"(\d+)", name)]
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _places(family: Family, config: Config, module: str) -> tuple[str, ...]:
    """Names in transformers of one litgpt module."""
    if module in family.top:
        return (family.top[module],)
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module)
    if match is None:
        raise ModelError(f"the weight {module!r} is not part of a litgpt model; export a checkpoint of pretraining")
    numbers = re.findall(r"\.(\d+)\.", match[2])
    place = _block_names(family, config).get(re.sub(r"\.\d+\.", ".{}.", match[2]))
    if place is None:
        raise ModelError(f"{family.architecture} has no place for {module!r}; merge adapters into the model first")
    prefix = family.block_prefix.format(match[1])
    places = (place,) if isinstance(place, str) else place
    return tuple(f"{prefix}.{name.format(*numbers)}" for name in places)


def _block_names(family: Family, config: Config) -> Mapping[str, str | tuple[str, ...]]:
    if family.model_type == "falcon" and not config.shared_attention_norm:
        return {**family.block, "norm_1": "ln_attn", "norm_2": "ln_mlp"}
    return family.block


def _single_operation(family: Family, config: Config, module: str) -> Operation:
    if module.endswith("attn.qkv") and family.interleaved_qkv:
        return "interleave"
    is_norm = "norm" in module.rpartition(".")[2] or module.endswith("ln_f") or ".norm_" in module
    # Source: litgpt config.py norm_class - its RMSNorm adds one exactly when the name says Gemma.
    adds_one = config.norm_class_name == "RMSNorm" and "Gemma" in config.name
    if is_norm and adds_one and not family.unit_offset:
        return "add_one"
    if is_norm and family.unit_offset and not adds_one:
        return "subtract_one"
    return "copy"


def apply_operation(operation: Operation, tensors: list[Any], config: Config) -> Any:
    """The Hugging Face tensor (`torch.Tensor`) made from litgpt's.

    Args:
        operation: From `Target.operation`.
        tensors: The source tensors in order; projections are (rows, n_embd) or, for biases, (rows,).
        config: The litgpt model, for its head counts.
    """
    import torch

    tensor = tensors[0]
    if operation == "concatenate":
        return torch.cat(tensors)
    if operation in ("add_one", "subtract_one"):
        return (tensor.float() + (1.0 if operation == "add_one" else -1.0)).to(tensor.dtype)
    if operation == "copy":
        return tensor
    groups, size = config.n_query_groups, config.head_size
    query, key, value = tensor.split((config.n_head * size, groups * size, groups * size))
    if operation == "interleave":
        parts = [part.unflatten(0, (groups, -1)) for part in (query, key, value)]
        return torch.cat(parts, dim=1).flatten(0, 1)
    return {"query": query, "key": key, "value": value}[operation]
