"""Parameters from a seed, each a pure function of (seed, parameter name, position inside it).

Comes in: a materialised model, sharded or not. Goes out: the same model, filled in place. Guarantee: one value per
(seed, name, position), so that 1 or 1,000 ranks, any mesh, and any order of construction give the same model. A rank
draws only the rows it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from pretrainkit.models.architectures import (
    GPT,
    CausalSelfAttention,
    GroupedTopkRouter,
    LLaMAMLP,
    MultiheadLatentAttention,
)
from pretrainkit.models.gpt import PretrainGPT

# Rows are drawn in groups of about this many elements, each from a generator of its own: the unit of sharing work.
_GROUP_ELEMENTS = 1 << 20
# What wrappers put into parameter names.
_WRAPPER_NAMES = (
    "_forward_module.",
    "_original_module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)


def initialize_parameters(model: nn.Module, seed: int) -> None:
    """See `pretrainkit.models.initialize_parameters`."""
    for module in model.modules():
        if isinstance(module, PretrainGPT):
            module.tie_weights()  # materialising a meta model part by part makes two of one
    deviations = dict(_deviations(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, deviations.get(id(parameter)), seed, _plain_name(name))
        for module in model.modules():
            if isinstance(module, GroupedTopkRouter):
                module.e_score_correction_bias.zero_()
            if isinstance(module, GPT):
                module.reset_parameters()  # of litgpt's GPT: the rotary tables, which are no parameters


def _plain_name(name: str) -> str:
    for part in _WRAPPER_NAMES:
        name = name.replace(part, "")
    return name


def _deviations(model: nn.Module) -> Iterator[tuple[int, float | str]]:
    """id(parameter) -> standard deviation of a normal distribution, or "zeros" / "ones".

    Source: litgpt pretrain.py initialize_weights (GPT-NeoX, https://arxiv.org/abs/2204.06745): every matrix
    sqrt(2 / (5 n_embd)), projections back into the residual stream 1 / (sqrt(n_embd) n_layer), biases zero, norms one.
    """
    config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
    wide = math.sqrt(2.0 / 5 / config.n_embd)
    residual = 1 / math.sqrt(config.n_embd) / config.n_layer
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, GroupedTopkRouter)):
            yield id(module.weight), wide
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            yield id(module.weight), "ones"
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            yield id(module.bias), "zeros"
    for module in model.modules():
        # litgpt narrows LLaMAMLP and CausalSelfAttention; latent attention writes into the residual stream as well.
        if isinstance(module, (LLaMAMLP, CausalSelfAttention, MultiheadLatentAttention)):
            yield id(module.proj.weight), residual


def _fill(parameter: nn.Parameter, deviation: float | str | None, seed: int, name: str) -> None:
    assert deviation is not None, f"no initial distribution is known for {name}"
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if isinstance(deviation, str):
        local.fill_(1.0 if deviation == "ones" else 0.0)
        return
    shape, offset = _local_part(parameter)
    if local.numel():
        local.copy_(_draw(seed, name, tuple(parameter.shape), shape, offset).mul_(deviation))


def _local_part(parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's part of a parameter and where it begins in the whole."""
    if not hasattr(parameter, "placements"):  # no DTensor; asking so spares a lone process their import
        return tuple(parameter.shape), (0,) * parameter.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(shape), tuple(offset)


def _draw(
    seed: int, name: str, whole: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]
) -> torch.Tensor:
    """The part at `offset` of a standard normal tensor of shape `whole`, on the CPU, fp32."""
    row_elements = math.prod(whole[1:])
    group_rows = max(1, _GROUP_ELEMENTS // row_elements)
    first, last = offset[0], offset[0] + shape[0]
    result = torch.empty(shape)
    columns = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))

    def draw_group(group: int) -> None:
        begin = group * group_rows
        rows = min(group_rows, whole[0] - begin)
        digest = hashlib.sha256(f"{seed}/{name}/{group}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.randn((rows, *whole[1:]), generator=generator)
        inner = slice(max(first - begin, 0), min(last - begin, rows))
        result[begin + inner.start - first : begin + inner.stop - first] = drawn[(inner, *columns)]

    groups = range(first // group_rows, -(-last // group_rows))
    if len(groups) == 1:
        draw_group(groups[0])
    else:
        with ThreadPoolExecutor(max_workers=min(torch.get_num_threads(), len(groups))) as pool:
            list(pool.map(draw_group, groups))
    return result
