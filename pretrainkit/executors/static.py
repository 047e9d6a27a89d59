"""Executor `static`: each rank that srun, torchrun or a Kubernetes indexed job started does its share; no Ray needed.

Comes in: this process's rank from the environment. Goes out: the units rank, rank + world size, ... of the whole plan.
Guarantee: the shares are fixed by the plan, never by what is still to do, so no unit falls between ranks; nobody waits
for anybody, and merge checks that all are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from pretrainkit.executors.local import LocalExecutor
from pretrainkit.topology import detect, granted_cpus, node_name
from pretrainkit.units.work import Job, UnitResult


class StaticExecutor:
    """Runs this rank's share in local processes; see `Executor`."""

    exclusive = False

    def __init__(self, num_workers: int | None, address: str | None) -> None:
        self._topology = detect(os.environ)
        if num_workers is None:
            # Ranks of one node share its CPUs, unless the scheduler has bound each to its own.
            bound = self._topology.launcher == "slurm" and "SLURM_CPUS_PER_TASK" in os.environ
            num_workers = max(1, granted_cpus(os.environ) // (1 if bound else self._topology.local_world_size))
        self._local = LocalExecutor(num_workers, address)

    def share(self, units: Sequence[int]) -> list[int]:
        """Every world-size-th unit, beginning with this rank's."""
        return list(units[self._topology.rank :: self._topology.world_size])

    def nodes(self) -> list[str]:
        """This node's folders."""
        return [node_name(os.environ)]

    def warm_up(self, tokenizer_dir: str, engines: Sequence[str], num_units: int) -> AbstractContextManager[None]:
        """See `Executor.warm_up`."""
        return self._local.warm_up(tokenizer_dir, engines, len(self.share(range(num_units))))

    def run(self, job: Job, units: Sequence[int], on_result: Callable[[UnitResult], None]) -> None:
        """See `Executor.run`."""
        self._local.run(job, units, on_result)
