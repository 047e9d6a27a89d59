"""litgpt's configurations and modules, without the rest of litgpt.

Every module here takes them from this one, so that litgpt's command line, and all that it loads, stays out of training.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pretrainkit.deferred import defer, defer_functions

defer("torchmetrics", "lightning", "litgpt")
defer_functions("litgpt.scripts.convert_hf_checkpoint", "qkv_reassemble")  # litgpt needs it for old checkpoints alone

from litgpt.config import Config, configs, name_to_config  # noqa: E402
from litgpt.model import (  # noqa: E402
    GPT,
    CausalSelfAttention,
    GroupedTopkRouter,
    LLaMAMLP,
    LLaMAMoE,
    MultiheadLatentAttention,
)

__all__ = [
    "GPT",
    "CausalSelfAttention",
    "Config",
    "GroupedTopkRouter",
    "LLaMAMLP",
    "LLaMAMoE",
    "MultiheadLatentAttention",
    "SketchableGPT",
    "configs",
    "name_to_config",
]


class SketchableGPT(GPT):  # type: ignore[misc]
    """litgpt's GPT, cheaper to make on the meta device: most operations there load PyTorch's compiler first."""

    def __init__(self, config: Config) -> None:
        on_meta = torch.get_default_device().type == "meta"
        with _NoInitialValues() if on_meta else contextlib.nullcontext():
            super().__init__(config)

    def rope_cache(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables' cosines and sines; on the meta device their shapes, from a table of one position."""
        if (device or torch.get_default_device()).type != "meta":
            result: tuple[torch.Tensor, torch.Tensor] = super().rope_cache(device=device)
            return result
        length: int = self.max_seq_length
        self._max_seq_length = 1
        try:
            cos, sin = super().rope_cache(device=torch.device("cpu"))
        finally:
            self._max_seq_length = length
        shape = (length, *cos.shape[1:])
        return cos.new_empty(shape, device="meta"), sin.new_empty(shape, device="meta")


class _NoInitialValues(TorchFunctionMode):
    """Within this context `torch.nn.init` leaves tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
