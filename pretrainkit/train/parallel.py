"""Ranks, devices, and a model laid out over them.

Comes in: the configuration and this process's place. Goes out: a launched Fabric, and a model that is compiled,
checkpointed, sharded, materialised and initialised, in that order. Guarantees: the same parameters whatever the number
of ranks, because nothing has a value before it is sharded; one code path for one CPU process and many nodes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrainkit.config import ComputeConfig, Precision, PretrainConfig
from pretrainkit.deferred import compiler_aside, defer
from pretrainkit.errors import ConfigError, LaunchError, PretrainKitError, TrainingError
from pretrainkit.models import initialize_parameters
from pretrainkit.models.masters import keep_masters
from pretrainkit.topology import Topology, granted_cpus

# Fabric's name for the mesh's dimensions; the second one is where FSDP shards, not tensor parallelism.
_REPLICATE, _SHARD = "data_parallel", "tensor_parallel"

# From how many values on the compiler writes what it computes from them to memory, when it is read more than once. With
# its own 4, the gradient of queries and keys that were normalised and rotated is written in fp32 and read twice again:
# a tenth of all that a block of Qwen 3 moves.
_COMPILER = {"realize_reads_threshold": 6}


def start_fabric(config: PretrainConfig, topology: Topology) -> Any:
    """A launched `lightning.Fabric` for this process.

    Raises:
        ConfigError: The number of replicas does not divide the number of ranks, or a precision the device lacks.
        LaunchError: More processes on this node than GPUs.
    """
    defer("torchmetrics", "lightning")
    with compiler_aside():
        from lightning.fabric import Fabric
        from lightning.fabric.plugins.environments import TorchElasticEnvironment

    on_gpu = torch.cuda.is_available()
    if on_gpu and topology.local_world_size > torch.cuda.device_count():
        raise LaunchError(
            f"{topology.local_world_size} processes on a node that see {torch.cuda.device_count()} GPUs; start one per "
            "GPU, and let each see all of them (srun: --gpus-per-node, not --gpus-per-task)"
        )
    if not on_gpu and topology.local_world_size > 1:
        torch.set_num_threads(max(1, granted_cpus(os.environ) // topology.local_world_size))
    replicas = num_replicas(config, topology.world_size, topology.num_nodes)
    precision = chosen_precision(config, "cuda" if on_gpu else "cpu")
    options: dict[str, Any] = {"accelerator": "gpu" if on_gpu else "cpu", "devices": 1}
    if topology.world_size > 1:
        options |= {
            "devices": topology.local_world_size,
            "num_nodes": topology.num_nodes,
            "strategy": _sharding_strategy(config, topology.world_size, replicas, precision),
            "plugins": [TorchElasticEnvironment()],
            # FSDP casts the parameters itself; autocast on top would cast again.
            "precision": "32-true" if precision == "bf16-mixed" else precision,
        }
    else:
        options["precision"] = precision
    if precision == "32-true" and on_gpu:
        torch.set_float32_matmul_precision("high")
    fabric = Fabric(**options)
    fabric.launch()
    return fabric


def chosen_precision(config: PretrainConfig, device_type: str) -> Precision:
    """As configured, else what suits the device."""
    return config.precision or ("bf16-mixed" if device_type == "cuda" else "32-true")


def num_replicas(config: PretrainConfig, world_size: int, num_nodes: int) -> int:
    """Copies of the model, each sharded over world_size / copies ranks.

    Raises:
        ConfigError: They do not divide the ranks.
    """
    replicas = config.compute.replicas or num_nodes
    if world_size % replicas:
        divisor = 1 if world_size % num_nodes else num_nodes
        raise ConfigError(
            f"compute.replicas={replicas} does not divide the {world_size} ranks; use a divisor, such as {divisor}"
        )
    return replicas


def _sharding_strategy(config: PretrainConfig, world_size: int, replicas: int, precision: Precision) -> Any:
    from lightning.fabric.strategies import ModelParallelStrategy

    timeout = timedelta(seconds=max(1800.0, 2 * (config.compute.hang_timeout_s or 0)))
    return ModelParallelStrategy(
        functools.partial(_shard, precision=precision, seed=config.seed),
        data_parallel_size=replicas,
        tensor_parallel_size=world_size // replicas,
        timeout=timeout,
    )


def _shard(model: nn.Module, mesh: Any, *, precision: Precision, seed: int) -> nn.Module:
    """Shard every block, then the rest, over the mesh, and fill the shards; called by Fabric.

    The activations between blocks are in the parameters' compute type; rotary tables must stay fp32, hence no casting
    of what is passed in.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=None if precision == "32-true" else torch.float32,
        cast_forward_inputs=False,
    )
    sharding = mesh if mesh[_REPLICATE].size() > 1 else mesh[_SHARD]
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=sharding, mp_policy=policy)
    # The root's parameters are needed at both ends of the pass: gathering them twice would be waste.
    fully_shard(model, mesh=sharding, mp_policy=policy, reshard_after_forward=False)
    _fill(model, mesh.device_type, seed)
    return model


def _fill(model: nn.Module, device_type: str, seed: int) -> None:
    """Give every parameter its memory and its first value.

    Raises:
        ConfigError: The device has not enough memory for them.
    """
    try:
        _materialise(model, device_type)
        initialize_parameters(model, seed)
    except RuntimeError as error:
        # Source: PyTorch c10/core/impl/alloc_cpu.cpp; on a CPU the exception has no class of its own.
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise ConfigError(
            "the model's weights do not fit into the memory of a rank's device; --dry_run says what is needed and what "
            "would help"
        ) from error


def _materialise(model: nn.Module, device_type: str) -> None:
    is_cuda = device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device(device_type)
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        model.to_empty(device=device)
    else:  # the same for plain tensors; `empty_like` of a meta tensor would load PyTorch's compiler first
        model._apply(  # type: ignore[no-untyped-call]
            lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        )


def set_up_model(fabric: Any, model: nn.Module, config: PretrainConfig) -> nn.Module:
    """Lay a model built on the meta device out over the devices and give its parameters their first values.

    Returns:
        What to call in training; `model` itself stays what to save and load.
    """
    compute = config.compute
    checkpoint_activations(model, compute.activation_checkpointing)
    if compute.float8:
        _use_float8(model)
    if uses_compile(compute, fabric.device.type):
        for part in (*model.transformer.h, model.transformer.ln_f):  # type: ignore[union-attr, misc]
            part.compile(options=_COMPILER)
    if fabric.world_size == 1:
        _fill(model, fabric.device.type, config.seed)
        precision = chosen_precision(config, fabric.device.type)
        if precision != "bf16-true":
            keep_masters(model, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    wrapped: nn.Module = fabric.setup_module(model, _reapply_compile=False)
    return wrapped


def uses_compile(compute: ComputeConfig, device_type: str) -> bool:
    """Whether blocks are compiled: as configured, on GPUs by default."""
    return device_type == "cuda" if compute.compile == "auto" else compute.compile


def checkpoint_activations(model: nn.Module, what: str) -> None:
    """Let the named parts of every block compute their activations again in the backward pass.

    The parts change their class and stay what they are, so that parameters keep their names.
    """
    if what == "none":
        return
    for block in model.transformer.h:  # type: ignore[union-attr]
        part: Any = {"block": block, "attention": block.attn, "mlp": block.mlp}[what]
        own_class: Any = type(part)
        part.__class__ = _checkpointed(own_class)


@functools.cache
def _checkpointed(part_class: type) -> type:
    """The same class, whose `forward` keeps nothing but its inputs.

    A class and no wrapper around each part's own method: the compiler takes such methods for as many different
    functions, compiles every block anew, and gives up after the eighth.
    """
    from torch.utils.checkpoint import checkpoint

    def forward(self: Any, *args: Any) -> Any:
        own = part_class.forward.__get__(self)  # type: ignore[attr-defined]
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False)

    return type(f"Checkpointed{part_class.__name__}", (part_class,), {"forward": forward})


def _use_float8(model: nn.Module) -> None:
    """Let the blocks' matrices multiply in float8."""
    check_float8()
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=_fits_float8)


def check_float8() -> None:
    """Refuse float8 where it cannot be.

    Raises:
        ConfigError: No GPU that can, or torchao is missing.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError("compute.float8 needs a GPU of compute capability 8.9 or later; leave it out")
    try:
        import torchao.float8  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError("compute.float8 needs torchao; pip install torchao") from error


def _fits_float8(module: Any, name: str) -> bool:
    """Whether a linear layer can be in float8.

    Source: torchao.float8 README: dimensions must be multiples of 16, the output head stays in bf16. So must the
    number of tokens be, which an expert's is not; and a router's choice must not hang on rounding.
    """
    is_dense = name.startswith("transformer.h.") and ".experts." not in name and not name.endswith(".gate")
    return is_dense and module.in_features % 16 == 0 and module.out_features % 16 == 0


def gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Switch FSDP's reduction of gradients on or off; off while micro batches accumulate."""
    # Not Fabric's no_backward_sync: it leaves the reduction off after its context.
    # Source: lightning fabric/strategies/model_parallel.py, _FSDPNoSync.__exit__.
    switch: Any = getattr(model, "set_requires_gradient_sync", None)
    if switch is not None:  # an FSDPModule; importing that class to ask costs a lone process half a second
        switch(enabled)


def cpu_group() -> Any:
    """A gloo group of all ranks for small messages between hosts; None with one rank. Call on every rank, in order."""
    return dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None


@contextlib.contextmanager
def parameter_dtype(precision: str | None) -> Iterator[None]:
    """Make new parameters bf16 for bf16-true, fp32 otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def together(function: Callable[[], Any], group: Any) -> Any:
    """Run something that may fail on every rank; when it fails on one, it fails on all of them.

    Raises:
        PretrainKitError: The first rank's error; a `TrainingError` stands for an exception of another kind.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        if group is None:
            raise
        error = caught
    message = (
        None if error is None else (type(error), str(error)) if isinstance(error, PretrainKitError) else repr(error)
    )
    messages = [(rank, other) for rank, other in enumerate(gather_objects(message, group)) if other is not None]
    if error is not None:
        raise error
    if messages:
        rank, first = messages[0]
        raise first[0](first[1]) if isinstance(first, tuple) else TrainingError(f"rank {rank} failed: {first}")
    return result
