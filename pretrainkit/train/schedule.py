"""The learning rate as a pure function of the tokens trained so far.

Guarantee: no state, no counter: the same tokens give the same learning rate, whatever was resumed, and on any number of
ranks. A course rises linearly over its warm-up, then does what its name says, and ends at the floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrainkit.config import OptimizerConfig, ScheduleConfig, TrainConfig
from pretrainkit.train.arithmetic import RunPlan


@dataclass(frozen=True, kw_only=True)
class Course:
    """The course of a learning rate."""

    name: Literal["cosine", "linear", "wsd", "constant"]
    """What happens after the warm-up."""
    peak: float
    """Learning rate after the warm-up."""
    floor: float
    """Learning rate at the end."""
    warmup_tokens: int
    """Tokens over which it rises from 0."""
    total_tokens: int | None
    """Tokens at which it reaches the floor; None for constant without an end."""
    decay_fraction: float = 0.1
    """wsd: the last part of total_tokens, in which it falls."""


def plan_course(plan: RunPlan, train: TrainConfig, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Course:
    """The course a configuration asks for."""
    return Course(
        name=schedule.name,
        peak=optimizer.init_args.lr,
        floor=train.min_lr,
        warmup_tokens=plan.tokens_at(plan.warmup_steps),
        total_tokens=plan.total_tokens,
        decay_fraction=1.0 if schedule.decay_from is not None else schedule.decay_fraction,
    )


def learning_rate(course: Course, tokens: int) -> float:
    """The learning rate of the step after which `tokens` tokens are trained.

    Example:
        >>> course = Course(name="linear", peak=1.0, floor=0.0, warmup_tokens=10, total_tokens=30)
        >>> [learning_rate(course, tokens) for tokens in (5, 10, 20, 30)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if tokens < course.warmup_tokens:
        return course.peak * tokens / course.warmup_tokens
    if course.name == "constant" or course.total_tokens is None:
        return course.peak
    start = course.warmup_tokens
    if course.name == "wsd":
        start = max(start, round(course.total_tokens * (1 - course.decay_fraction)))
    progress = min(max((tokens - start) / max(course.total_tokens - start, 1), 0.0), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if course.name == "cosine" else 1 - progress
    return course.floor + remaining * (course.peak - course.floor)
