"""A language model's loss without its logits: output head and cross entropy in one, a chunk of positions at a time.

Comes in: hidden states, the head's weights and the targets. Goes out: summed cross entropy and z-loss. Guarantee:
equal to cross entropy over the full logits; at most one chunk of logits exists at a time, because a chunk's gradient is
made while its logits are there, instead of in the backward pass. That also saves computing the logits twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from pretrainkit.models.documents import IGNORED_TARGET

# Logits of one chunk. More chunks mean less memory, and more often a pass over the head's whole gradient to add to it.
_CHUNK_LOGITS_FUSED = 1 << 28  # bf16 logits and their gradient: 1 GiB
_CHUNK_LOGITS_GPU = 1 << 26  # several fp32 temporaries: 1 GiB
_CHUNK_LOGITS_CPU = 1 << 22  # 16 MiB of fp32: stays near the caches


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over positions of cross entropy + z_loss x logsumexp(logits)^2.

    Args:
        hidden: (positions, n_embd), what the head would be applied to.
        weight: (vocabulary, n_embd) of the head.
        bias: (vocabulary,) of the head, or None.
        targets: (positions,) int64; IGNORED_TARGET counts nothing.
        z_loss: Weight of the squared log-partition; 0 leaves it out of the loss (it is still returned).
        softcap: Logits become softcap x tanh(logits / softcap) first.
        chunk_tokens: Positions per chunk; None chooses by the vocabulary.
        fused: Compile the element-wise part.

    Returns:
        (loss, cross entropy, sum of squared log-partitions), scalars, fp32; only the first carries gradients.
    """
    device_type = hidden.device.type
    # A custom function sees no autocast: the compute type is chosen here.
    autocast = torch.is_autocast_enabled(device_type)
    compute_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    if chunk_tokens is None:
        budget = _CHUNK_LOGITS_CPU if device_type == "cpu" else _CHUNK_LOGITS_FUSED if fused else _CHUNK_LOGITS_GPU
        chunk_tokens = max(1, budget // weight.shape[0])
    step = _fused_step() if fused else loss_and_logit_gradient
    options = (z_loss, softcap, chunk_tokens, compute_dtype, torch.is_grad_enabled(), step)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _LinearCrossEntropy.apply(hidden, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    return result


def loss_and_logit_gradient(
    logits: torch.Tensor, targets: torch.Tensor, z_loss: float, softcap: float | None, gradient_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy and squared log-partition of one chunk, summed, and the loss's gradient by its logits.

    Args:
        logits: (positions, vocabulary), before soft capping.
        targets: (positions,) int64.
        z_loss: Weight of the squared log-partition.
        softcap: As in `linear_cross_entropy`.
        gradient_dtype: Type of the returned gradient.

    Returns:
        (cross entropy, squared log-partition, (positions, vocabulary) gradient of cross entropy + z_loss x square).
    """
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != IGNORED_TARGET
    index = targets.clamp_min(0)[:, None]
    log_partition = torch.logsumexp(logits, dim=-1)  # (positions,)
    cross_entropy = torch.where(counted, log_partition - logits.gather(1, index)[:, 0], 0.0).sum()
    square = torch.where(counted, log_partition.square(), 0.0).sum()

    # d/dlogits [lse - logit_t + z lse^2] = softmax (1 + 2 z lse) - onehot(t)
    gradient = torch.exp(logits - log_partition[:, None])
    gradient = gradient * (1.0 + 2.0 * z_loss * log_partition)[:, None]
    is_target = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = torch.where(is_target, gradient - 1.0, gradient)
    gradient = gradient * counted[:, None]
    if softcap is not None:
        gradient = gradient * (1.0 - (logits / softcap).square())
    return cross_entropy, square, gradient.to(gradient_dtype)


@functools.cache
def _fused_step() -> Callable[..., Any]:
    return torch.compile(loss_and_logit_gradient, dynamic=False)


def _accumulate(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Add in fp32: a bf16 sum of many chunks would lose the small ones."""
    return part if total is None else total.float().add_(part)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in forward, chunk by chunk, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        options: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z_loss, softcap, chunk_tokens, dtype, needs_gradient, step = options
        cast_weight = weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        cross_entropy = torch.zeros((), device=hidden.device, dtype=torch.float32)
        square = torch.zeros_like(cross_entropy)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs_gradient else None
        grad_weight: torch.Tensor | None = None
        grad_bias: torch.Tensor | None = None

        # Chunks of equal length where possible, so that a compiled step meets one shape.
        start = 0
        for chunk in hidden.tensor_split(-(-len(targets) // chunk_tokens)):
            stop = start + len(chunk)
            cast_hidden = chunk.to(dtype)
            logits = functional.linear(cast_hidden, cast_weight, cast_bias)
            ce, sq, gradient = step(logits, targets[start:stop], z_loss, softcap, dtype)
            cross_entropy += ce
            square += sq
            if grad_hidden is not None:
                torch.mm(gradient, cast_weight, out=grad_hidden[start:stop])
                grad_weight = _accumulate(grad_weight, gradient.t() @ cast_hidden)
                if bias is not None:
                    grad_bias = _accumulate(grad_bias, gradient.sum(0))
            start = stop

        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(cross_entropy, square)
        loss = cross_entropy + z_loss * square if z_loss else cross_entropy.clone()
        return loss, cross_entropy, square

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss was already differentiated once"
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)
