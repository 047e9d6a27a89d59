"""litgpt's tensors -> the Hugging Face model's tensors, each made when it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrainkit.export.reading import LazyTensor, Tensors
from pretrainkit.export.sources import TrainedModel
from pretrainkit.models.huggingface import Target, apply_operation, plan_weights

if TYPE_CHECKING:
    import torch


def huggingface_tensors(model: TrainedModel, *, tied: bool) -> Tensors:
    """The Hugging Face model's tensors, each made from litgpt's when it is read."""
    read = _remember_last(model.tensors)
    tensors = {}
    for target in plan_weights(model.config, model.tensors, tied=tied):
        tensors[target.name] = LazyTensor(
            shape=_target_shape(target, model),
            dtype=model.tensors[target.sources[0]].dtype,
            read=functools.partial(_make, target, model, read),
        )
    return tensors


def _remember_last(tensors: Tensors) -> Callable[[str], torch.Tensor]:
    """Read by name, keeping the last one: three targets in a row are made from one fused projection."""
    return functools.lru_cache(maxsize=1)(lambda name: tensors[name].read())


def _make(target: Target, model: TrainedModel, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    tensor: torch.Tensor = apply_operation(target.operation, [read(name) for name in target.sources], model.config)
    return tensor


def _target_shape(target: Target, model: TrainedModel) -> tuple[int, ...]:
    import torch

    sources = [torch.empty(model.tensors[name].shape, device="meta") for name in target.sources]
    return tuple(apply_operation(target.operation, sources, model.config).shape)
