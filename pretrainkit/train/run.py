"""Everything a training loop works with, made by `setup` and used by `loop`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrainkit.config import PretrainConfig
from pretrainkit.stream import BlockLoader, ValidationLoader
from pretrainkit.train.arithmetic import RunPlan
from pretrainkit.train.checkpoint import CheckpointWriter
from pretrainkit.train.guard import Guard
from pretrainkit.train.metrics import MetricsWriter, Speed
from pretrainkit.train.schedule import Course, plan_course
from pretrainkit.train.signals import Ballot, SignalWatch
from pretrainkit.train.state import TrainState
from pretrainkit.train.watchdog import Watchdog
from pretrainkit.train.window import Window

# Bytes per second that each rank can count on while all of them write.
_SLOW_STORE = 2e8


@dataclass(kw_only=True)
class Run:
    """One process's part of a run."""

    config: PretrainConfig
    """What was asked for."""
    plan: RunPlan
    """What it means in steps."""
    course: Course
    """Learning rate by tokens."""
    plan_from: Callable[[TrainState], RunPlan]
    """The plan of a run that goes on from a state; another one where that lies before a change of the batch size."""
    speed: Speed
    """Tokens per second -> utilisation."""
    fabric: Any
    """Launched."""
    model: nn.Module
    """What is called; wrapped by Fabric."""
    bare_model: nn.Module
    """What is saved and sharded; has litgpt's names."""
    optimizers: list[torch.optim.Optimizer]
    """Hold every parameter once."""
    guard: Guard
    """Judges steps."""
    window: Window
    """What happened since the last log line."""
    state: TrainState
    """Where the run stands."""
    open_loader: Callable[[TrainState], BlockLoader]
    """Training data from the state's place on."""
    validation: dict[str, ValidationLoader]
    """Validation data per source; empty without."""
    tokenizer: bytes | None
    """Content of tokenizer.json, for samples of text; None without."""
    checkpoints: CheckpointWriter
    """Writes what `snapshot` gives."""
    snapshot: Callable[[], tuple[dict[str, Any], dict[str, Any]]]
    """(tensors, record) of the state as it stands."""
    restore: Callable[[Path], dict[str, Any]]
    """Fills the tensors from a checkpoint and returns its record."""
    metrics: MetricsWriter
    """Says it."""
    signals: SignalWatch
    """Hears it."""
    ballot: Ballot
    """Agrees on it."""
    watchdog: Watchdog
    """Ends it when it hangs."""
    group: Any
    """gloo group for small messages between hosts; None with one rank."""
    deadline: float | None
    """`time.monotonic()` at which everything must be saved; None without a limit."""

    def __post_init__(self) -> None:
        num_bytes: int = sum(value.numel() * value.element_size() for value in self.bare_model.state_dict().values())
        # With the two averages of AdamW.
        self._first_save_seconds = 3.0 * num_bytes / self.plan.world_size / _SLOW_STORE

    @property
    def save_seconds(self) -> float:
        """What the next save may take: as long as the last; before the first, its bytes at the pace of a slow store."""
        return self.checkpoints.last_seconds or self.state.save_seconds or self._first_save_seconds

    def replan(self) -> None:
        """Plan the rest from where the state stands now."""
        self.plan = self.plan_from(self.state)
        self.course = plan_course(self.plan, self.config.train, self.config.schedule, self.config.optimizer)
        self.state.portions = self.plan.portions
