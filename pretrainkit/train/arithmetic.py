"""Batch sizes, steps and tokens: what a configuration means on so many ranks with so much data.

Comes in: the configuration, the number of ranks, the number of blocks in the dataset, and the portions in which an
earlier process trained. Goes out: one frozen `RunPlan`. Pure functions. Guarantee: nothing is rounded silently: what
does not divide is refused with the nearest that does, and a limit that is not a whole number of steps is met from below
and said so; a run whose batch size was changed still ends at its limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrainkit.config import ScheduleConfig, TrainConfig
from pretrainkit.errors import ConfigError, DatasetError

DEFAULT_WARMUP_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Steps of one size, until the next portion begins."""

    first_step: int = 0
    """Steps before it."""
    first_token: int = 0
    """Tokens trained before it."""
    tokens_per_step: int
    """Tokens of each of its steps, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How long a run is and how a step is made up."""

    world_size: int
    """Ranks."""
    block_size: int
    """Tokens trained per block."""
    accumulation: int
    """Micro batches per rank and step."""
    portions: tuple[Portion, ...]
    """Steps of one size each; the last is the present one."""
    total_steps: int | None
    """Steps of the whole run; None when only time limits it."""
    warmup_steps: int
    """Steps over which the learning rate rises."""
    steps_per_epoch: float
    """Steps in one pass over the data."""
    limit: str
    """What ends the run, in words."""
    notes: tuple[str, ...] = ()
    """What the configuration does not do exactly as it says."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.portions[-1].tokens_per_step

    @property
    def total_tokens(self) -> int | None:
        """Tokens of the whole run; None when only time limits it."""
        return None if self.total_steps is None else self.tokens_at(self.total_steps)

    def tokens_at(self, step: int) -> int:
        """Tokens trained in the first `step` steps."""
        portion = [portion for portion in self.portions if portion.first_step <= step][-1]
        return portion.first_token + (step - portion.first_step) * portion.tokens_per_step


def add_portion(portions: Sequence[Portion], step: int, tokens: int, tokens_per_step: int) -> tuple[Portion, ...]:
    """The portions of a run that goes on from this step in steps of this size."""
    before = tuple(portion for portion in portions if portion.first_step <= step)
    if before and before[-1].tokens_per_step == tokens_per_step:
        return before
    before = tuple(portion for portion in before if portion.first_step < step)
    return (*before, Portion(first_step=step, first_token=tokens, tokens_per_step=tokens_per_step))


def plan_run(
    train: TrainConfig,
    schedule: ScheduleConfig,
    *,
    world_size: int,
    block_size: int,
    num_blocks: int,
    portions: Sequence[Portion] = (),
    step: int = 0,
    tokens: int = 0,
) -> RunPlan:
    """Work out the steps of a run.

    Args:
        train: Batch sizes and limits.
        schedule: Its name decides whether an open end is possible.
        world_size: Ranks.
        block_size: Tokens trained per block.
        num_blocks: Blocks in the training data.
        portions: In which the run was trained so far.
        step: Steps trained so far.
        tokens: Tokens trained so far.

    Raises:
        ConfigError: The batch sizes do not divide, a limit is below one step, or a falling learning rate has no end.
        DatasetError: The data holds less than one global batch.
    """
    accumulation = accumulation_steps(train.global_batch_size, train.micro_batch_size, world_size)
    tokens_per_step = train.global_batch_size * block_size
    if num_blocks < train.global_batch_size:
        raise DatasetError(
            f"the training data has {num_blocks:,} blocks of {block_size:,} tokens, less than one step of "
            f"train.global_batch_size={train.global_batch_size}; lower it to {num_blocks} or add data"
        )
    portions = add_portion(portions, step, tokens, tokens_per_step)
    total_steps, limit, notes = _total_steps(train, portions[-1], num_blocks / train.global_batch_size)
    if total_steps is None and schedule.name != "constant":
        raise ConfigError(
            f"train.max_time alone does not say where schedule.name={schedule.name} ends; add train.max_tokens, "
            "max_steps or epochs, or use schedule.name=constant"
        )
    warmup_steps = _warmup_steps(train, schedule, total_steps)
    if total_steps is not None and warmup_steps >= total_steps:
        notes += (f"the learning rate rises over {warmup_steps:,} steps, which is all of this run's {total_steps:,}",)
    return RunPlan(
        world_size=world_size,
        block_size=block_size,
        accumulation=accumulation,
        portions=portions,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        steps_per_epoch=num_blocks / train.global_batch_size,
        limit=limit,
        notes=notes,
    )


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro batches per rank and step.

    Raises:
        ConfigError: They do not divide; names the nearest global batch that does.
    """
    portion = micro_batch_size * world_size
    if global_batch_size % portion:
        below = global_batch_size // portion * portion
        nearest = (
            below if below and global_batch_size - below <= below + portion - global_batch_size else below + portion
        )
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
            f"{micro_batch_size} x {world_size}; use {nearest} or change micro_batch_size"
        )
    return global_batch_size // portion


def _total_steps(
    train: TrainConfig, portion: Portion, steps_per_epoch: float
) -> tuple[int | None, str, tuple[str, ...]]:
    """Steps that meet every limit, the words for the limit that decides, and what it leaves out."""
    tokens_per_step = portion.tokens_per_step
    limits: list[tuple[int, str]] = []
    notes: tuple[str, ...] = ()
    if train.max_steps is not None:
        limits.append((train.max_steps, f"train.max_steps={train.max_steps:,}"))
    if train.max_tokens is not None:
        words = f"train.max_tokens={train.max_tokens:,}"
        if train.max_tokens < tokens_per_step:
            raise ConfigError(f"{words} is less than one step of {tokens_per_step:,} tokens; use at least that")
        steps, rest = divmod(max(train.max_tokens - portion.first_token, 0), tokens_per_step)
        limits.append((portion.first_step + steps, words))
        if rest:
            notes = (f"{words} is not a whole number of steps of {tokens_per_step:,}; {rest:,} stay untrained",)
    epochs = train.epochs
    if epochs is None and not limits and train.max_time is None:
        epochs = 1
    if epochs is not None:
        # A share of 1e-9 forgives the rounding of e.g. 0.1 x 30.
        whole = epochs * steps_per_epoch * (1 + 1e-9)
        if whole < 1:
            raise ConfigError(
                f"train.epochs={epochs:g} is less than one step; one pass has {steps_per_epoch:.1f} steps, use "
                f"at least {1 / steps_per_epoch:.2g} or lower train.global_batch_size"
            )
        steps = max(math.floor(whole - portion.first_token / tokens_per_step), 0)
        limits.append((portion.first_step + steps, f"{epochs:g} pass{'' if epochs == 1 else 'es'} over the data"))
    if not limits:
        return None, f"train.max_time={train.max_time:g} s", notes
    steps, words = min(limits, key=lambda limit: limit[0])
    return steps, words, notes


def _warmup_steps(train: TrainConfig, schedule: ScheduleConfig, total_steps: int | None) -> int:
    if schedule.decay_from is not None:
        return 0  # the whole run is the decay of one that is warm already
    if train.lr_warmup_fraction is not None:
        if total_steps is None:
            raise ConfigError("train.lr_warmup_fraction needs a length of the run; use train.lr_warmup_steps")
        return round(train.lr_warmup_fraction * total_steps)
    if train.lr_warmup_steps is not None:
        return train.lr_warmup_steps
    return DEFAULT_WARMUP_STEPS if total_steps is None else min(DEFAULT_WARMUP_STEPS, total_steps // 10)
