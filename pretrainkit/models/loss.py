"""A language model's loss without its logits: output head and cross entropy in one, a chunk of positions at a time.

Comes in: hidden states, the head's weights and the targets. Goes out: summed cross entropy and z-loss. Guarantee:
equal to cross entropy over the full logits; at most one chunk of logits exists at a time, because a chunk's gradient is
made while its logits are there, instead of in the backward pass. That also saves computing the logits twice.

A head that has a master (`pretrainkit.models.masters`) gets its gradient there, added up over chunks and micro batches
alike: no pass over the head's whole gradient to scale it, and none to add it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from pretrainkit.models.documents import IGNORED_TARGET
from pretrainkit.models.masters import master_of

# What one chunk may take. Every chunk is a pass over the head's whole fp32 gradient, to add to it: 4 GB to move at
# Llama 3's width.
_SHARE_OF_GPU = 1 / 20
_BYTES_ON_CPU = 1 << 28  # smaller chunks make matrix products too thin to be fast

# Whether a product of 16-bit matrices on an NVIDIA GPU can be added to an fp32 matrix.
# Source: torch aten/src/ATen/native/cuda/Blas.cpp, _addmm_dtype_out_cuda, since pytorch/pytorch#167931.
_ADDS_IN_FP32 = torch.__version__ >= "2.10" and torch.version.hip is None


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
        weight: (vocabulary, n_embd) of the head. With a master, the loss must be differentiated with factor 1.
        bias: (vocabulary,) of the head, or None.
        targets: (positions,) int64; IGNORED_TARGET counts nothing.
        z_loss: Weight of the squared log-partition; 0 leaves it out of the loss (it is still returned).
        softcap: Logits become softcap x tanh(logits / softcap) first.
        chunk_tokens: Positions per chunk; None chooses by the vocabulary and the device's memory.
        fused: Compile the element-wise part.

    Returns:
        (loss, cross entropy, sum of squared log-partitions), scalars, fp32; only the first carries gradients.
    """
    device_type = hidden.device.type
    # A custom function sees no autocast: the compute type is chosen here.
    autocast = torch.is_autocast_enabled(device_type)
    compute_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    if chunk_tokens is None:
        per_position = weight.shape[0] * bytes_per_logit(device_type, compute_dtype.itemsize, fused=fused)
        memory_bytes = torch.cuda.get_device_properties(hidden.device).total_memory if hidden.is_cuda else 0
        chunk_tokens = positions_per_chunk(per_position, device_type, memory_bytes)
    step = _fused_step() if fused else loss_and_logit_gradient
    options = (z_loss, softcap, chunk_tokens, compute_dtype, torch.is_grad_enabled(), step)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _LinearCrossEntropy.apply(hidden, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    return result


def bytes_per_logit(device_type: str, element_bytes: int, *, fused: bool) -> int:
    """What one logit takes in computing the loss: itself, its gradient, and fp32 copies where nothing is fused."""
    if device_type == "cpu":
        return 8
    return 2 * element_bytes if fused else 16


def positions_per_chunk(bytes_per_position: int, device_type: str, memory_bytes: float) -> int:
    """How many positions have logits at a time, on a device of so much memory."""
    budget = _SHARE_OF_GPU * memory_bytes if device_type == "cuda" else _BYTES_ON_CPU
    return max(1, int(budget / bytes_per_position))


def loss_and_logit_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    softcap: float | None,
    gradient_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross entropy and squared log-partition of one chunk, summed, and the loss's gradient by its logits.

    The gradient comes as a matrix and a factor for each of its rows: the caller scales what the rows are multiplied
    with, which is narrower than the rows themselves.

    Args:
        logits: (positions, vocabulary), before soft capping; may be overwritten.
        targets: (positions,) int64.
        z_loss: Weight of the squared log-partition.
        softcap: As in `linear_cross_entropy`.
        gradient_dtype: Type of the returned matrix; None computes no gradient.

    Returns:
        (cross entropy, squared log-partition, (positions,) row factors, (positions, vocabulary) matrix or None).
    """
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != IGNORED_TARGET
    index = targets.clamp_min(0)[:, None]
    log_probability = torch.log_softmax(logits, dim=-1)
    target_log_probability = log_probability.gather(1, index)
    target_logit = logits.gather(1, index)
    log_partition = target_logit - target_log_probability  # (positions, 1)
    cross_entropy = -torch.where(counted, target_log_probability[:, 0], 0.0).sum()
    square = torch.where(counted, log_partition[:, 0].square(), 0.0).sum()

    # The gradient of log_partition - target_logit + z log_partition^2 is
    # (1 + 2 z log_partition) x (softmax - onehot / (1 + 2 z log_partition)).
    widening = 1.0 + 2.0 * z_loss * log_partition
    factors = torch.where(counted, widening[:, 0], 0.0)
    if gradient_dtype is None:
        return cross_entropy, square, factors, None
    at_target = target_log_probability.exp() - 1.0 / widening
    gradient = log_probability.exp_()
    if softcap is not None:
        gradient = gradient * (1.0 - (logits / softcap).square())
        at_target = at_target * (1.0 - (target_logit / softcap).square())
    gradient = gradient.to(gradient_dtype)
    # Not scatter_, which on a CPU makes two fp32 copies of a bf16 matrix to set one number per row.
    gradient[torch.arange(len(gradient), device=gradient.device), index[:, 0]] = at_target[:, 0].to(gradient_dtype)
    return cross_entropy, square, factors, gradient


@functools.cache
def _fused_step() -> Callable[..., Any]:
    return torch.compile(loss_and_logit_gradient, dynamic=False)


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total + left @ right`, in fp32 from the second product on: a bf16 sum of many would lose the small ones."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if left.is_cuda and _ADDS_IN_FP32:  # the product itself adds: no pass over the head's whole gradient beside it
        if total is None:
            return torch.mm(left, right, torch.float32)
        return torch.addmm(total, left, right, torch.float32, out=total)
    product = left @ right
    return product if total is None else total.float().add_(product)


def _num_chunks(positions: int, chunk_tokens: int) -> int:
    """Chunks of at most `chunk_tokens`; of equal length where that takes no more than half as many again.

    A compiled step is compiled once per length.
    """
    least = -(-positions // chunk_tokens)
    return next((number for number in range(least, least + least // 2 + 1) if positions % number == 0), least)


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
        gradient_dtype = dtype if needs_gradient else None
        cast_weight = weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        cross_entropy = torch.zeros((), device=hidden.device, dtype=torch.float32)
        square = torch.zeros_like(cross_entropy)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs_gradient else None
        master = master_of(weight) if needs_gradient else None
        grad_weight = None if master is None else master.grad
        grad_bias: torch.Tensor | None = None

        start = 0
        for chunk in hidden.tensor_split(_num_chunks(len(targets), chunk_tokens)):
            stop = start + len(chunk)
            cast_hidden = chunk.to(dtype)
            logits = functional.linear(cast_hidden, cast_weight, cast_bias)
            ce, sq, factors, gradient = step(logits, targets[start:stop], z_loss, softcap, gradient_dtype)
            cross_entropy += ce
            square += sq
            if gradient is not None and grad_hidden is not None:
                factors = factors[:, None].to(dtype)
                torch.mm(gradient, cast_weight, out=grad_hidden[start:stop]).mul_(factors)
                grad_weight = _add_product(grad_weight, gradient.t(), cast_hidden * factors)
                if bias is not None:
                    grad_bias = _add_product(grad_bias, gradient.t(), factors)
            start = stop

        if master is not None:
            assert grad_weight is not None
            master.grad, grad_weight = grad_weight.float(), None
        ctx.gradients = (grad_hidden, grad_weight, None if grad_bias is None else grad_bias[:, 0])
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
