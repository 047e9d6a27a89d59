"""What a pretraining run consists of: the keys of `config_hub/*.yaml`, their meaning, defaults and limits.

Comes in: values from the command line, a YAML file or a caller. Goes out: frozen dataclasses whose values make sense
one by one and together; what needs the dataset or the number of devices is checked by `pretrainkit.train.arithmetic`.
Keys that litgpt has keep litgpt's names. Guarantee: a wrong value is a `ConfigError` naming the key, the value and the
way out.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrainkit.errors import ConfigError
from pretrainkit.values import above, at_home, between, refuse_secrets, require

Precision = Literal["bf16-mixed", "bf16-true", "32-true"]
LoggerName = Literal["wandb", "tensorboard", "csv", "none"]
LauncherName = Literal["auto", "local", "torchrun", "slurm", "ray"]
Checkpointing = Literal["none", "attention", "mlp", "block"]


def _resolve(config: object, prefix: str, *keys: str) -> None:
    """Take paths as a user means them, `~` included; part of a configuration's construction."""
    for key in keys:
        value = getattr(config, key)
        if value not in (None, True, False, "auto"):  # what `resume` may be besides a path
            object.__setattr__(config, key, Path(at_home(prefix + key, value)))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and in what portions to train; litgpt's `train` keys."""

    global_batch_size: int = 512
    """Blocks per optimizer step over all ranks."""
    micro_batch_size: int = 4
    """Blocks per forward pass of one rank; the rest of the global batch is gradient accumulation."""
    max_tokens: int | None = None
    """Stop after this many tokens."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    max_time: float | None = None
    """Stop after this many seconds from the command's start (on Ray from the workers'); leaves time to save."""
    epochs: float | None = None
    """Stop after this many passes over the dataset. With none of the four limits given: one pass."""
    max_seq_length: int | None = None
    """Tokens per block (the context trained with); null takes the model's own block_size."""
    tie_embeddings: bool = False
    """Share one matrix between token embedding and output head."""
    lr_warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0; null: 2000, at most a tenth of the run."""
    lr_warmup_fraction: float | None = None
    """The same as a share of the whole run; give one of the two."""
    min_lr: float = 4e-5
    """Learning rate at the end of the schedule."""
    max_norm: float | None = 1.0
    """Clip the gradient's norm to this; null for no clipping."""
    log_interval: int = 1
    """Steps between log lines."""
    save_interval: int | None = 1000
    """Steps between checkpoints; null saves at the end only."""

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "micro_batch_size", "max_tokens", "max_steps", "max_time", "epochs",
                    "max_seq_length", "max_norm", "log_interval", "save_interval"):  # fmt: skip
            above(f"train.{key}", getattr(self, key))
        require(self.min_lr >= 0, "train.min_lr", self.min_lr, "must not be negative")
        above("train.lr_warmup_steps", self.lr_warmup_steps, -1)
        between("train.lr_warmup_fraction", self.lr_warmup_fraction, 0, 1)
        if self.lr_warmup_fraction is not None and self.lr_warmup_steps is not None:
            raise ConfigError("train.lr_warmup_steps and train.lr_warmup_fraction say the same thing; give one of them")
        if self.global_batch_size % self.micro_batch_size:
            nearest = max(round(self.global_batch_size / self.micro_batch_size), 1) * self.micro_batch_size
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size="
                f"{self.micro_batch_size}; use {nearest} or change micro_batch_size"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how to validate; litgpt's `eval` keys."""

    interval: int | None = 1000
    """Steps between validations; null for none in between."""
    max_iters: int = 100
    """Micro batches per rank and validation, at most; fewer when the validation data has fewer."""
    initial_validation: bool = False
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    prompts: list[str] = field(default_factory=list)
    """Texts to continue after each validation, so that one sees what the model says; needs the dataset's tokenizer."""
    max_new_tokens: int = 32
    """Tokens to continue each prompt by."""

    def __post_init__(self) -> None:
        above("eval.interval", self.interval)
        above("eval.max_iters", self.max_iters)
        above("eval.max_new_tokens", self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """Settings of the optimizer."""

    lr: float = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running averages of gradient and squared gradient."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    momentum: float = 0.95
    """Muon's momentum."""

    def __post_init__(self) -> None:
        above("optimizer.init_args.lr", self.lr)
        above("optimizer.init_args.eps", self.eps)
        require(self.weight_decay >= 0, "optimizer.init_args.weight_decay", self.weight_decay, "must not be negative")
        for beta in self.betas:
            require(0 <= beta < 1, "optimizer.init_args.betas", self.betas, "must each be in [0, 1)")
        require(0 <= self.momentum < 1, "optimizer.init_args.momentum", self.momentum, "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, in litgpt's form. An allow-list: no other class is ever imported."""

    class_path: Literal["torch.optim.AdamW", "AdamW", "Muon"] = "torch.optim.AdamW"
    """AdamW, or Muon for the blocks' matrices with AdamW for everything else."""
    init_args: OptimizerArgs = OptimizerArgs()
    """Its settings."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate's course after warm-up, a pure function of the tokens seen."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine and linear fall to min_lr over the run; wsd stays, then falls in its last part; constant stays."""
    decay_fraction: float = 0.1
    """wsd: the part of the run at its end in which the learning rate falls linearly."""
    decay_from: Path | None = None
    """wsd: start from this checkpoint of a stable phase and let the whole run be its decay."""

    def __post_init__(self) -> None:
        _resolve(self, "schedule.", "decay_from")
        between("schedule.decay_fraction", self.decay_fraction, 0, 1)
        if self.decay_from is not None and self.name != "wsd":
            raise ConfigError(f"schedule.decay_from belongs to schedule.name=wsd, not to {self.name}; change one")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on besides `dataset_path`, and how it is read."""

    sources: dict[str, float] = field(default_factory=dict)
    """A mixture instead of dataset_path: folder (with train/ and val/) -> weight; weights need not add up to 1."""
    document_mask: bool = False
    """Keep attention inside documents; their ends come from the tokens."""
    shuffle: bool = True
    """Mix the blocks of the whole dataset; false reads them in the order on disk."""
    num_workers: int = 1
    """Threads per rank that read ahead; does not change what is read."""
    prefetch_batches: int = 4
    """Micro batches per rank held ready."""
    cache_dir: Path | None = None
    """Where chunks of a remote dataset are kept; null takes a temporary folder per node."""
    max_cache_bytes: int = 50_000_000_000
    """Remote chunks kept at a time."""

    def __post_init__(self) -> None:
        refuse_secrets(self.sources)  # first: what is said of a source names it
        names = {name: at_home("data.sources", name) for name in self.sources}
        for index, (name, path) in enumerate(names.items()):
            same = [other for other in list(names)[:index] if os.path.normpath(names[other]) == os.path.normpath(path)]
            if same:
                raise ConfigError(f"data.sources names one dataset twice, {same[0]} and {name}; add their weights up")
        object.__setattr__(self, "sources", {names[name]: weight for name, weight in self.sources.items()})
        _resolve(self, "data.", "cache_dir")
        for source, weight in self.sources.items():
            above(f"data.sources[{source}]", weight)
        between("data.num_workers", self.num_workers, 0, 256)
        between("data.prefetch_batches", self.prefetch_batches, 1, 10_000)
        above("data.max_cache_bytes", self.max_cache_bytes)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss besides cross entropy."""

    z_loss: float = 0.0
    """Weight of the squared log-partition, which keeps logits small; 1e-4 is usual, 0 is off."""
    chunk_tokens: int | None = None
    """Positions whose logits exist at a time; null chooses by vocabulary and memory."""

    def __post_init__(self) -> None:
        require(0 <= self.z_loss < math.inf, "loss.z_loss", self.z_loss, "must not be negative")
        above("loss.chunk_tokens", self.chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do about a step that would hurt the model; decided on the device, without waiting for it."""

    spike_factor: float | None = None
    """Skip a step whose gradient norm exceeds this many times its running average; null skips non-finite ones only."""
    warmup_steps: int = 100
    """Steps before spikes are looked for."""
    max_skips: int = 10
    """Skipped steps within `window` steps that make the run go back to its last good checkpoint."""
    window: int = 100
    """Steps over which skips are counted."""
    max_rewinds: int = 3
    """Times a run may go back before it gives up."""

    def __post_init__(self) -> None:
        above("guard.spike_factor", self.spike_factor, 1)
        for key in ("warmup_steps", "max_rewinds"):
            above(f"guard.{key}", getattr(self, key), -1)
        above("guard.max_skips", self.max_skips)
        between("guard.window", self.window, 1, 1_000_000)
        if self.max_skips > self.window:
            raise ConfigError(
                f"guard.max_skips={self.max_skips} cannot happen within guard.window={self.window} steps; use at most "
                f"{self.window}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are kept and how they are written."""

    keep_last: int | None = 3
    """Newest checkpoints kept; older ones are deleted. null keeps all."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True
    """Write while training goes on; costs one copy of the state in the nodes' memory."""

    def __post_init__(self) -> None:
        above("checkpoint.keep_last", self.keep_last)
        above("checkpoint.keep_every", self.keep_every)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the devices are used; none of it changes what is computed beyond rounding."""

    compile: bool | Literal["auto"] = "auto"
    """Compile each transformer block; auto: on GPUs only."""
    activation_checkpointing: Checkpointing = "none"
    """Parts whose activations are computed again in the backward pass instead of kept."""
    replicas: int | None = None
    """Copies of the model, each sharded over the ranks it has; null: one per node. 1 shards over all ranks."""
    float8: bool = False
    """Multiply the blocks' matrices in float8; needs a GPU of compute capability 8.9 and torchao."""
    hang_timeout_s: float | None = 1800
    """A rank without progress for this long is named, with its stack, and the run ends; null waits for ever."""
    peak_flops: float | None = None
    """Dense bf16 operations per second of one device, for MFU; null knows the usual GPUs."""

    def __post_init__(self) -> None:
        above("compute.replicas", self.replicas)
        between("compute.hang_timeout_s", self.hang_timeout_s, 1, 31_536_000, "; null waits for ever")
        above("compute.peak_flops", self.peak_flops)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What wandb is told; litgpt's `log` keys."""

    project: str | None = None
    """wandb project."""
    run: str | None = None
    """wandb run name."""
    group: str | None = None
    """wandb group."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that determines a run; what `pretrain` was called with. Saved as RUN/config.yaml."""

    model_name: str | None = None
    """A model litgpt knows."""
    model_config: dict[str, Any] | None = None
    """litgpt Config keys: a model of one's own, or changes to the named one."""
    dataset_path: str | None = None
    """Folder or URL with train/ and val/, as merge writes them; or give data.sources."""
    out_dir: Path = Path("out/pretrain")
    """Run folder: checkpoints, metrics, configuration."""
    precision: Precision | None = None
    """bf16-mixed computes in bf16 on fp32 parameters; null: that on GPUs, 32-true on a CPU."""
    initial_checkpoint_dir: Path | None = None
    """Begin with the weights of this checkpoint: ours, or a litgpt folder."""
    resume: bool | Literal["auto"] | Path = False
    """true or auto: go on from the newest whole checkpoint in out_dir (auto starts anew where there is none); a
    checkpoint's folder: from that one, and newer ones in out_dir are set aside."""
    data: DataConfig = DataConfig()
    """What is read, and how."""
    train: TrainConfig = TrainConfig()
    """How long, in what portions."""
    eval: EvalConfig = EvalConfig()
    """Validation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How to step."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""
    loss: LossConfig = LossConfig()
    """Loss."""
    guard: GuardConfig = GuardConfig()
    """Bad steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    compute: ComputeConfig = ComputeConfig()
    """Devices."""
    log: LogConfig = LogConfig()
    """wandb."""
    logger_name: LoggerName = "none"
    """Where metrics go besides metrics.jsonl."""
    devices: int | Literal["auto"] = "auto"
    """Processes per node: GPUs, or CPU processes where there is none; auto: every GPU, or one CPU process."""
    num_nodes: int = 1
    """Machines."""
    launcher: LauncherName = "auto"
    """Who starts the processes; auto sees torchrun's and Slurm's variables."""
    tokenizer_dir: Path | None = None
    """Tokenizer files to put into checkpoints; null takes the dataset's."""
    seed: int = 42
    """Determines the parameters' first values and the order of the data."""
    dry_run: bool = False
    """Say what the run would be and cost, then stop."""

    def __post_init__(self) -> None:
        refuse_secrets([self.dataset_path or ""])
        _resolve(self, "", "out_dir", "initial_checkpoint_dir", "tokenizer_dir", "resume")
        if self.dataset_path is not None:
            object.__setattr__(self, "dataset_path", at_home("dataset_path", self.dataset_path))
        above("num_nodes", self.num_nodes)
        if self.devices != "auto":
            above("devices", self.devices)
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        lr = self.optimizer.init_args.lr
        if self.train.min_lr > lr:
            raise ConfigError(f"train.min_lr={self.train.min_lr:g} is above optimizer.init_args.lr={lr:g}; lower it")
        if self.model_name is None and self.model_config is None:
            raise ConfigError("no model: give --model_name, or model_config in a --config file")
        if (self.dataset_path is None) == (not self.data.sources):
            state = "both are" if self.data.sources else "neither is"
            raise ConfigError(f"give either dataset_path or data.sources; {state} given")
        if self.launcher == "local" and self.num_nodes > 1:
            raise ConfigError(
                f"launcher=local starts processes on this machine alone, not on num_nodes={self.num_nodes}; leave "
                "launcher out, or start it with torchrun, srun or Ray"
            )
        if self.out_dir.parts[:1] and self.out_dir.parts[0].endswith(":"):
            raise ConfigError(
                f"out_dir={self.out_dir} is a URL; training writes to a folder: give one that every node sees"
            )
        beginnings = {"resume": self.resume not in (False, "auto"), "schedule.decay_from": self.schedule.decay_from}
        for key, is_given in beginnings.items():
            if is_given and self.initial_checkpoint_dir is not None:
                raise ConfigError(f"{key} and initial_checkpoint_dir exclude each other; give one of them")

    @property
    def sources(self) -> dict[str, float]:
        """Dataset folders with their weights, one entry for a plain `dataset_path`."""
        return dict(self.data.sources) if self.dataset_path is None else {self.dataset_path: 1.0}
