"""The optimizer, and the step that clips and skips without the host knowing.

Comes in: a model, sharded or not. Goes out: fused AdamW, or Muon for the blocks' matrices beside it. Guarantees: weight
decay touches matrices alone, never norms, biases or embeddings; a step reads `grad_scale` and `found_inf` on the
device, so that clipping and skipping need no host synchronisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrainkit.config import OptimizerConfig
from pretrainkit.errors import ConfigError
from pretrainkit.models.masters import stored

_MATMUL_STEPS = 5  # Newton-Schulz iterations
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold every parameter once: [AdamW] or [AdamW, Muon].

    Raises:
        ConfigError: Muon is asked for, but the model has no matrices in its blocks.
    """
    matrices: list[nn.Parameter] = []
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, own in model.named_parameters():
        parameter = stored(own)
        if parameter.dim() < 2 or id(own) in embeddings:
            others.append(parameter)
        elif config.class_path == "Muon" and ".h." in f".{name}" and parameter.dim() == 2:
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    if config.class_path == "Muon" and not hidden:
        raise ConfigError("optimizer.class_path=Muon needs transformer blocks with matrices; use torch.optim.AdamW")
    args = config.init_args
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = AdamW(
        [group for group in groups if group["params"]], lr=args.lr, betas=args.betas, eps=args.eps, fused=True
    )
    _create_state(adamw)
    if not hidden:
        return [adamw]
    return [adamw, Muon(hidden, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum)]


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, out of its compiler's reach.

    PyTorch wraps these methods to keep them out of compiled code, where ours never are. The wrappers load the compiler,
    which takes an uncompiled run longer than everything else before its first step.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def _create_state(adamw: torch.optim.AdamW) -> None:
    """Make the averages before the first step, so that a checkpoint can be loaded into them.

    Source: torch/optim/adam.py, Adam._init_group, for fused.
    """
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def gradient_norm(optimizers: list[torch.optim.Optimizer]) -> torch.Tensor:
    """Norm of the whole model's gradient, over all shards: an fp32 scalar on the device, the same on every rank."""
    gradients = [
        parameter.grad
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()


def take_step(
    optimizers: list[torch.optim.Optimizer], *, learning_rate: float, grad_scale: torch.Tensor, skip: torch.Tensor
) -> None:
    """Step with every gradient divided by `grad_scale`, or leave everything as it is where `skip` is 1.

    Args:
        optimizers: From `build_optimizer`.
        learning_rate: Of this step.
        grad_scale: Scalar on the device.
        skip: Scalar on the device, 0.0 or 1.0.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # AdamW's fused kernel reads these two attributes. Source: torch/optim/adamw.py and _fused_adamw.
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before the step (Nesterov, scaled to AdamW's usual step size).

    Differs from `torch.optim.Muon` in reading `grad_scale` and `found_inf` on the device, and in working on sharded
    matrices: each rank completes the matrix, computes the same update, and applies its own part.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        for parameter in parameters:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; a closure is not supported."""
        assert closure is None
        assert self.found_inf is not None
        taken = 1.0 - self.found_inf
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group, taken)

    def _step_one(self, parameter: nn.Parameter, group: dict[str, Any], taken: torch.Tensor) -> None:
        momentum = self.state[parameter]["momentum"]
        local, local_momentum = _local(parameter), _local(momentum)
        # A gradient that is not finite must not reach the momentum even times zero.
        assert self.grad_scale is not None
        gradient = torch.where(taken > 0, _local(parameter.grad) / self.grad_scale, local_momentum)
        local_momentum.lerp_(gradient, (1 - group["momentum"]) * taken)
        look_ahead = torch.lerp(gradient, local_momentum, group["momentum"])
        update = _orthogonal(_whole(look_ahead, parameter))
        # Root mean square of an orthogonal matrix is 1 / sqrt(longer side); AdamW's steps have about 0.2.
        # Source: Liu et al. 2025, "Muon is scalable for LLM training", section 2.2.
        scale = 0.2 * max(update.shape) ** 0.5
        local.mul_(1 - group["lr"] * group["weight_decay"] * taken)
        local.sub_(own_part(update, parameter).to(local.dtype) * (group["lr"] * scale * taken))


def _local(tensor: Any) -> torch.Tensor:
    result: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return result


def _whole(local: torch.Tensor, like: Any) -> torch.Tensor:
    """The whole matrix of which `local` is this rank's part, laid out like `like`."""
    if not hasattr(like, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    part = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    result: torch.Tensor = part.full_tensor()
    return result


def own_part(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """This rank's part of a whole tensor, cut like `like`."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    part: torch.Tensor = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return part


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearest matrix with orthogonal rows or columns, approximately, by Newton-Schulz iterations in bf16."""
    x: torch.Tensor = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_MATMUL_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = x.T if tall else x
    return result
