"""Where units run: local processes, Ray, or the ranks that a scheduler started.

Comes in: a job, the numbers of its unfinished units, and a function that takes each result. Goes out: nothing but
those calls; the work itself lies on disk. Guarantee: each unit is reported once, whatever dies in between; when `run`
returns or raises, none of its processes is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pretrainkit.registry import Registry
from pretrainkit.units.work import Job, UnitResult

EXECUTORS = Registry(
    "executor",
    {
        "local": "pretrainkit.executors.local:LocalExecutor",
        "ray": "pretrainkit.executors.ray:RayExecutor",
        "static": "pretrainkit.executors.static:StaticExecutor",
    },
)

# A unit that kills this many workers in a row kills every worker: bad luck does not explain it.
MAX_DEATHS_PER_UNIT = 3


class Executor(Protocol):
    """Runs units."""

    def __init__(self, num_workers: int | None, address: str | None) -> None:
        """Prepare; starts nothing.

        Args:
            num_workers: Worker processes; None takes every CPU granted, 0 works in this process (local executor).
            address: Ray cluster to join (ray executor).
        """

    @property
    def exclusive(self) -> bool:
        """Whether this process is the only one that works on the output."""

    def share(self, units: Sequence[int]) -> list[int]:
        """The units of the whole plan that are this process's to do."""

    def warm_up(self, tokenizer_dir: str, engines: Sequence[str], num_units: int) -> AbstractContextManager[None]:
        """Start what takes long while the job is still being settled; `run` within the block uses it.

        Args:
            tokenizer_dir: Local tokenizer folder.
            engines: Names of the engines that workers will probably need.
            num_units: Units there may be to do.
        """

    def run(self, job: Job, units: Sequence[int], on_result: Callable[[UnitResult], None]) -> None:
        """Do `units`.

        Raises:
            LaunchError: Workers cannot be started, or a unit keeps killing them.
            PretrainKitError: A worker met it.
        """

    def nodes(self) -> list[str]:
        """Names of the node folders that are this process's to complete; [] means all that it sees."""
