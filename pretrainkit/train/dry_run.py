"""What a run would be and cost, before it costs anything.

Comes in: the configuration. Goes out: steps, tokens, epochs, parameters, memory per device, checkpoint sizes,
operations and time. Guarantees: reads the data's index and builds the model on the meta device alone; nothing that is
written stays and no device memory is used; what cannot fit is refused with the flags that make it fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import ConfigError
from pretrainkit.models import flops_per_token, memory_facts, num_parameters
from pretrainkit.models.loss import bytes_per_logit, positions_per_chunk
from pretrainkit.storage import storage_errors
from pretrainkit.topology import detect
from pretrainkit.train.facts import Facts, check_start, look_at, new_model
from pretrainkit.train.metrics import duration, peak_flops
from pretrainkit.train.parallel import check_float8, chosen_precision, num_replicas, uses_compile
from pretrainkit.train.side_files import SideFiles

logger = logging.getLogger(__name__)

# What is taken for granted where this machine cannot say.
_ASSUMED_GPU, _ASSUMED_GPU_BYTES = "NVIDIA H100 80GB", 80e9
_ASSUMED_MFU = 0.4
_USABLE = 0.92  # of a device's memory; the rest is the allocator's and the libraries'
_PROBE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on."""

    name: str
    """For people."""
    kind: Literal["cuda", "cpu"]
    """Which rules hold."""
    memory_bytes: float
    """Of one rank."""
    flops: float
    """Operations per second that training may reach."""
    basis: str
    """Where `flops` comes from."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at the peak of a step."""

    weights: float
    """This rank's shard."""
    gradients: float
    """This rank's shard; the whole model's while micro batches accumulate."""
    optimizer: float
    """This rank's shard."""
    gathered: float
    """Parameters brought together, or cast, for computing."""
    activations: float
    """Kept for the backward pass of one micro batch."""
    logits: float
    """One chunk of them with its gradient."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.logits


def report(config: PretrainConfig) -> None:
    """Log what the run would be.

    Raises:
        ConfigError: It does not fit into the devices' memory.
        PretrainKitError: Anything else that would end the run at its start.
    """
    device, world_size = _device(config)
    if config.compute.float8 and (device.kind == "cpu" or torch.cuda.is_available()):  # else it runs elsewhere
        check_float8()
    check_start(config)
    _check_out_dir(config.out_dir)
    facts = look_at(config, world_size)
    SideFiles(config, facts.model_config, facts.sources[0].folder, speak=True)
    new_model(config, facts, torch.device("cpu"))  # on the meta device; refuses what cannot be built
    memory = plan_memory(config, facts, world_size, device)
    for line in _lines(config, facts, device, memory):
        logger.info("%s", line)
    for source in facts.sources:
        source.check_files()
        source.warn_of_unreachable_tokens()
    check_fit(config, facts, world_size, device)


def _check_out_dir(out_dir: Path) -> None:
    """Refuse a folder that cannot be made or written: whether it can is seen by trying, which leaves nothing behind.

    Raises:
        StorageError: It cannot.
    """
    nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    with storage_errors(f"write {out_dir}"), tempfile.TemporaryDirectory(prefix=".pretrainkit-", dir=nearest):
        pass


def plan_memory(config: PretrainConfig, facts: Facts, world_size: int, device: Device) -> Memory:
    """Bytes on one rank."""
    precision = chosen_precision(config, device.kind)
    stored = 2 if precision == "bf16-true" else 4
    computed = 4 if precision == "32-true" else 2
    needs = memory_facts(
        facts.model_config,
        block_size=facts.block_size,
        micro_batch_size=config.train.micro_batch_size,
        checkpointing=config.compute.activation_checkpointing,
        bytes_per_element=computed,
        tie_embeddings=config.train.tie_embeddings,
    )
    shards = world_size // num_replicas(config, world_size, _num_nodes(config))
    shard = needs.parameters / shards
    if world_size > 1:
        gathered = 2.0 * needs.largest_block_parameters * computed  # the one in use, and the next on its way
    else:
        gathered = float(needs.parameters * computed if computed < stored else 0)
    gradients = shard * (4 if world_size > 1 else stored)
    if world_size > 1 and config.train.global_batch_size > config.train.micro_batch_size * world_size:
        # Between micro batches FSDP reduces nothing, and keeps whole gradients instead.
        # Source: torch distributed/fsdp/_fully_shard/_fsdp_param.py, to_accumulated_grad_if_needed.
        gradients = 4.0 * needs.parameters
    return Memory(
        weights=shard * stored,
        gradients=gradients,
        optimizer=shard * stored * (1 if config.optimizer.class_path == "Muon" else 2),
        gathered=gathered,
        activations=float(needs.activation_bytes),
        logits=_logits(config, facts, device, computed),
    )


def _logits(config: PretrainConfig, facts: Facts, device: Device, element_bytes: int) -> float:
    """Bytes of one chunk of the loss."""
    fused = uses_compile(config.compute, device.kind)
    per_position = facts.model_config.padded_vocab_size * bytes_per_logit(device.kind, element_bytes, fused=fused)
    chunk = config.loss.chunk_tokens or positions_per_chunk(per_position, device.kind, device.memory_bytes)
    return float(per_position * min(chunk, config.train.micro_batch_size * facts.block_size))


def check_fit(config: PretrainConfig, facts: Facts, world_size: int, device: Device) -> None:
    """Refuse a run that needs more memory than a device has.

    Raises:
        ConfigError: With the fewest flags that make it fit.
    """
    usable = _USABLE * device.memory_bytes
    needed = plan_memory(config, facts, world_size, device).total
    if needed <= usable:
        return
    choices = itertools.product(*_remedies(config, world_size))
    for chosen in sorted(choices, key=lambda several: sum(remedy is not None for remedy in several)):
        remedies = [remedy for remedy in chosen if remedy is not None]
        changed = config
        for remedy in remedies:
            changed = remedy.applied_to(changed)
        if plan_memory(changed, facts, world_size, device).total <= usable:
            way = " and ".join(remedy.words for remedy in remedies)
            break
    else:
        way = "more devices or nodes, or a smaller model"
    raise ConfigError(f"a rank needs about {_gb(needed)}, and {device.name} has {_gb(device.memory_bytes)}; use {way}")


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change that needs less memory."""

    group: str
    """Where the key is; "" for the configuration itself."""
    key: str
    """What is changed."""
    value: object
    """To what."""
    hint: str = ""
    """Why that helps."""

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.group}{'.' if self.group else ''}{self.key}={self.value}{self.hint}"

    def applied_to(self, config: PretrainConfig) -> PretrainConfig:
        """The configuration with this change."""
        change: dict[str, Any] = {self.key: self.value}
        if self.group:
            change = {self.group: dataclasses.replace(getattr(config, self.group), **change)}
        return dataclasses.replace(config, **change)


def _remedies(config: PretrainConfig, world_size: int) -> list[list[Remedy | None]]:
    """What may be changed, or not (None), each with its choices; what costs the run least comes first."""
    micro, whole = config.train.micro_batch_size, config.train.global_batch_size // world_size
    sizes = [size for size in range(micro - 1, 0, -1) if whole % size == 0]
    micro_batches = [Remedy(group="train", key="micro_batch_size", value=size) for size in sizes]
    if world_size > 1 and whole > micro:
        hint = " (without accumulation, during which FSDP keeps whole gradients)"
        micro_batches.insert(0, Remedy(group="train", key="micro_batch_size", value=whole, hint=hint))
    replicas = Remedy(group="compute", key="replicas", value=1, hint=" (sharding over all ranks)")
    block = Remedy(group="compute", key="activation_checkpointing", value="block")
    precision = Remedy(group="", key="precision", value="bf16-true")
    return [
        [None, *([replicas] if (config.compute.replicas or _num_nodes(config)) > 1 else [])],
        [None, *([block] if config.compute.activation_checkpointing != "block" else [])],
        [None, *micro_batches],
        [None, *([precision] if config.precision != "bf16-true" else [])],
    ]


def _lines(config: PretrainConfig, facts: Facts, device: Device, memory: Memory) -> list[str]:
    plan, train = facts.plan, config.train
    parameters = num_parameters(facts.model_config, tie_embeddings=train.tie_embeddings)
    full, causal = flops_per_token(facts.model_config, facts.block_size)
    blocks = sum(source.num_blocks for source in facts.sources)
    name = facts.model_config.name or "a model of one's own"
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "logits")
    rows = {
        "model": f"{name}: {parameters:,} parameters, context {facts.block_size:,}",
        "data": f"{blocks:,} blocks = {blocks * facts.block_size:,} tokens, {plan.steps_per_epoch:,.1f} steps a pass",
        "batch": f"{train.global_batch_size:,} blocks = {plan.tokens_per_step:,} tokens per step",
        "ranks": f"{plan.world_size} ranks x {plan.accumulation} micro batches x {train.micro_batch_size} blocks",
        "memory": f"{_gb(memory.total)} of {_gb(device.memory_bytes)} per rank",
        "": ", ".join(f"{part} {_gb(getattr(memory, part))}" for part in parts),
        "checkpoint": f"{_gb(_checkpoint_bytes(config, parameters))} each",
        "until": plan.limit,
    }
    if plan.total_steps is not None and plan.total_tokens is not None:
        work = plan.total_tokens * full
        time_needed = duration(work / (device.flops * plan.world_size))
        passes = plan.total_steps / plan.steps_per_epoch
        rows["run"] = f"{plan.total_steps:,} steps = {plan.total_tokens:,} tokens = {passes:.2f} passes"
        rows["warm-up"] = f"{plan.warmup_steps:,} steps"
        rows["operations"] = f"{work:.3g} ({plan.total_tokens * causal:.3g} with causal attention)"
        rows["time"] = f"about {time_needed} on {plan.world_size} x {device.name}, {device.basis}"
    return [f"{label:<12}{text}" for label, text in rows.items()] + [f"note        {note}" for note in plan.notes]


def _checkpoint_bytes(config: PretrainConfig, parameters: int) -> float:
    stored = 2 if config.precision == "bf16-true" else 4
    return float(parameters * stored * (2 if config.optimizer.class_path == "Muon" else 3))


def _num_nodes(config: PretrainConfig) -> int:
    place = detect(os.environ)
    return config.num_nodes if place.launcher == "none" else place.num_nodes


def _device(config: PretrainConfig) -> tuple[Device, int]:
    """What a rank would run on, and how many ranks there would be."""
    place = detect(os.environ)
    gpus = torch.cuda.device_count()
    per_node = max(1, gpus) if config.devices == "auto" else config.devices
    world_size = place.world_size if place.launcher != "none" else per_node * config.num_nodes
    if gpus:
        properties = torch.cuda.get_device_properties(0)
        peak = config.compute.peak_flops or peak_flops(properties.name) or peak_flops(_ASSUMED_GPU) or 1e15
        return _gpu(properties.name, float(properties.total_memory), peak), world_size
    if world_size > 1:  # planned here, run elsewhere
        peak = config.compute.peak_flops or peak_flops(_ASSUMED_GPU) or 1e15
        return _gpu(f"{_ASSUMED_GPU} (assumed: there is no GPU here)", _ASSUMED_GPU_BYTES, peak), world_size
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    flops = _probe()
    basis = f"at half of this CPU's measured {flops / 1e9:.0f} GFLOP/s"
    return Device(name="this CPU", kind="cpu", memory_bytes=memory, flops=flops / 2, basis=basis), world_size


def _gpu(name: str, memory_bytes: float, peak: float) -> Device:
    basis = f"at an assumed MFU of {_ASSUMED_MFU:.0%} of {peak / 1e12:.0f} TFLOP/s"
    return Device(name=name, kind="cuda", memory_bytes=memory_bytes, flops=_ASSUMED_MFU * peak, basis=basis)


def _probe() -> float:
    """Operations per second of a matrix product on this CPU."""
    size = 512
    matrix = torch.ones(size, size)
    (matrix @ matrix).sum()
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < _PROBE_SECONDS:
        (matrix @ matrix).sum()
        rounds += 1
    return rounds * 2.0 * size**3 / (time.perf_counter() - start)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
