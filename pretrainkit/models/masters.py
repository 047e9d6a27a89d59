"""Master weights: what the optimizer steps, beside what a single device computes with.

Comes in: a model of fp32 parameters, whole on its device. Goes out: the same model whose linear layers hold bf16
copies, each with its fp32 master, and whose gradients are added up in fp32, on the masters. Guarantee: the values are
those of autocast, which casts every weight and every gradient in every micro batch and adds them in a pass of its own:
24 bytes moved per element, where this way moves 12. FSDP keeps masters of its own, the shards, and needs none of this.

A weight with a master that is an output head or an embedding skips autograd: `linear_cross_entropy` and `embed` add its
gradient to the master's at once. Differentiate such a loss with factor 1, and scale in the optimizer's step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def keep_masters(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Give output head and embedding masters, and all linear layers where they compute in another type than fp32.

    Args:
        model: A `PretrainGPT`, fp32, not sharded, with its values.
        compute_dtype: What linear layers compute in: bf16 under autocast.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and compute_dtype != torch.float32:
            _split(module.weight, compute_dtype)
    for weight in (model.lm_head.weight, model.transformer.wte.weight):  # type: ignore[union-attr]
        if master_of(weight) is None:
            _split(weight, torch.float32)  # shares its memory: nothing to copy


def _split(weight: Any, compute_dtype: torch.dtype) -> None:
    weight.master = nn.Parameter(weight.data)
    weight.data = weight.data.to(compute_dtype)
    weight.register_post_accumulate_grad_hook(_hand_over)


def _hand_over(weight: Any) -> None:
    """Add the gradient that autograd has just completed to the master's."""
    gradient, weight.grad = weight.grad, None
    if gradient is None:
        return  # a head or an embedding: it is there already
    if weight.master.grad is None:
        weight.master.grad = gradient.float()
    else:
        weight.master.grad.add_(gradient)


def master_of(weight: Any) -> nn.Parameter | None:
    """A weight's master; None where there is none."""
    master: nn.Parameter | None = getattr(weight, "master", None)
    return master


def stored(parameter: Any) -> Any:
    """What optimizers and checkpoints hold of a parameter: its master, or else itself."""
    return getattr(parameter, "master", parameter)


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict with masters in place of copies, sharing memory; when filled, `cast_masters` is due."""
    return {name: stored(value).detach() for name, value in model.state_dict(keep_vars=True).items()}


@torch.no_grad()
def cast_masters(model: nn.Module) -> None:
    """Bring the copies up to date after a step or a load."""
    copies: list[Any] = [weight for weight in model.parameters() if weight.dtype != stored(weight).dtype]
    if copies:
        torch._foreach_copy_(copies, [weight.master for weight in copies])


def embed(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(...) ids -> (..., n_embd) rows of a weight."""
    if master_of(weight) is None:
        return functional.embedding(tokens, weight)
    result: torch.Tensor = _Embedding.apply(tokens, weight)  # type: ignore[no-untyped-call]
    return result


class _Embedding(torch.autograd.Function):
    """Adds to the rows that were looked up, where autograd makes and adds a gradient of the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.master = master_of(weight)
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        (tokens,) = ctx.saved_tensors
        _add_rows(ctx.master, tokens.flatten(), gradient.flatten(0, -2).float())
        return None, None


def _add_rows(master: nn.Parameter, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add gradients, (positions, n_embd), to the rows that (positions,) ids name: the same bits every time.

    Rows that several positions name are summed first, by the kernel that sums in a fixed order: additions to one row
    from all sides, as `index_add_` makes them on a GPU, come in any order.
    """
    vocabulary, positions = len(master), len(tokens)
    if master.grad is None:
        master.grad = _sum_rows(gradient, tokens, vocabulary)
    elif positions >= vocabulary:
        master.grad += _sum_rows(gradient, tokens, vocabulary)
    else:
        ordered, order = tokens.sort(stable=True)
        number = torch.zeros_like(tokens)  # of the distinct id, counted from 0
        number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        sums = _sum_rows(gradient, torch.empty_like(tokens).scatter_(0, order, number), positions)
        # How many distinct ids there are only the device knows. What is left over adds nothing, each to another row:
        # thousands of additions to the same one would wait for each other.
        rows = torch.arange(positions, device=tokens.device).scatter_(0, number, ordered)
        master.grad.index_add_(0, rows, sums)


def _sum_rows(gradient: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    result: torch.Tensor = torch.ops.aten.embedding_dense_backward(gradient, rows, num_rows, -1, False)
    return result
