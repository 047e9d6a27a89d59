"""Pretraining: a dataset of blocks -> sharded checkpoints of a litgpt model.

Reading order: `pretrain` (here) -> launchers -> `setup` (one process) -> `loop`. Beside them, one concern each:

    arithmetic    batch sizes, steps, tokens        schedule     learning rate by tokens
    facts         what fits together, checked first  dry_run      what it would cost
    parallel      ranks, sharding, compilation       optimizer    AdamW, Muon; clip and skip on the device
    guard         which steps are taken              window       sums between two log lines
    metrics       rows and lines                     loggers      wandb, tensorboard, csv
    evaluation    validation loss, samples           signals      stopping together
    checkpoint    writing, keeping, finding          manifest     hashes; dcp: tensors without pickles
    snapshot      state <-> tensors and record       state        the counters
    initial       weights to begin with              watchdog     hung ranks

Importing this loads no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pretrainkit.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LauncherName,
    LogConfig,
    LoggerName,
    LossConfig,
    OptimizerConfig,
    Precision,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = ["pretrain"]

_PROCESSES_PER_CPU = 8


def pretrain(  # noqa: PLR0913, PLR0917 - the signature is the command line, the YAML schema and the reference page
    model_name: str | None = None,
    model_config: dict[str, Any] | None = None,
    dataset_path: str | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: Precision | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataConfig = DataConfig(),
    train: TrainConfig = TrainConfig(),
    eval: EvalConfig = EvalConfig(),  # noqa: A002 - litgpt's name
    optimizer: OptimizerConfig = OptimizerConfig(),
    schedule: ScheduleConfig = ScheduleConfig(),
    loss: LossConfig = LossConfig(),
    guard: GuardConfig = GuardConfig(),
    checkpoint: CheckpointConfig = CheckpointConfig(),
    compute: ComputeConfig = ComputeConfig(),
    log: LogConfig = LogConfig(),
    logger_name: LoggerName = "none",
    devices: int | Literal["auto"] = "auto",
    num_nodes: int = 1,
    launcher: LauncherName = "auto",
    tokenizer_dir: Path | None = None,
    seed: int = 42,
    dry_run: bool = False,
) -> None:
    """Pretrain a language model on a merged dataset, on one CPU or many nodes, and write checkpoints.

    Args:
        model_name: A model litgpt knows, such as pythia-160m or Meta-Llama-3-8B.
        model_config: litgpt Config keys: a model of one's own, or changes to the named one.
        dataset_path: Folder or URL with train/ and val/, as merge writes them; or give data.sources.
        out_dir: Run folder: checkpoints, metrics, configuration.
        precision: bf16-mixed computes in bf16 on fp32 parameters; null takes that on GPUs, 32-true on a CPU.
        initial_checkpoint_dir: Begin with the weights of this checkpoint, ours or a litgpt folder.
        resume: true or auto goes on from the newest whole checkpoint in out_dir (auto begins where there is none); or
            a checkpoint folder.
        data: What is read, and how.
        train: How long, in what portions.
        eval: Validation.
        optimizer: How to step.
        schedule: Learning rate.
        loss: Loss.
        guard: Bad steps.
        checkpoint: Which checkpoints are kept, and how they are written.
        compute: How the devices are used.
        log: What wandb is told.
        logger_name: Where metrics go besides metrics.jsonl.
        devices: Processes per node, GPUs where there are any; auto takes every GPU, or one CPU process.
        num_nodes: Machines.
        launcher: Who starts the processes; auto sees torchrun's and Slurm's variables.
        tokenizer_dir: Tokenizer files to put into checkpoints; null takes the dataset's.
        seed: Determines the parameters' first values and the order of the data.
        dry_run: Say what the run would be and cost, then stop.

    Raises:
        PretrainKitError: A wrong value, data or checkpoint; nothing has been trained.
        Interrupted: A signal asked to stop; everything is saved.

    Example:
        >>> pretrain(model_name="pythia-14m", dataset_path="data", out_dir=Path("run"))
    """
    config = PretrainConfig(**locals())
    if dry_run:
        from pretrainkit.train.dry_run import report

        report(config)
        return
    from pretrainkit.launchers import launch

    _check_devices(config)
    launch("pretrainkit.train.setup:train_process", config)


def _check_devices(config: PretrainConfig) -> None:
    """Refuse more CPU processes than could get anywhere, each of which loads PyTorch, before any of them starts.

    Raises:
        LaunchError: There are too many.
    """
    from pretrainkit.errors import LaunchError
    from pretrainkit.launchers import choose
    from pretrainkit.topology import granted_cpus

    most = _PROCESSES_PER_CPU * granted_cpus(os.environ)
    if config.devices == "auto" or config.devices <= most or choose(config, os.environ) != "local":
        return
    import torch

    if not torch.cuda.is_available():  # where there are GPUs, their number decides
        raise LaunchError(
            f"devices={config.devices}, but this machine has no GPU and grants {most // _PROCESSES_PER_CPU} CPUs; use "
            f"at most {most}"
        )
