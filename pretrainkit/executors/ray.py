"""Executor `ray`: the units of a job as tasks on a Ray cluster, or on a Ray started on this machine.

Comes in: a job on storage that every node sees. Goes out: each node writes its own folder; only unit numbers and counts
travel. Guarantee: a unit lost with its worker or its node is done again elsewhere; what a lost or silent node had
committed is adopted from storage; duplicates are harmless, because a unit's bytes depend on the plan alone.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pretrainkit.errors import ConfigError, LaunchError, PretrainKitError
from pretrainkit.executors import MAX_DEATHS_PER_UNIT
from pretrainkit.units.runner import UnitRunner, preload
from pretrainkit.units.work import Job, UnitResult

logger = logging.getLogger(__name__)

_TASKS_PER_CPU = 2  # one runs, one waits: a worker is never idle, and little is lost with a node
_POLL_S = 2.0
# A unit that takes this much longer than others is done a second time: its node may have fallen silent.
_STRAGGLER_FACTOR = 4
_STRAGGLER_MIN_S = 10.0


class RayExecutor:
    """Runs units as Ray tasks; see `Executor`."""

    exclusive = True

    def __init__(self, num_workers: int | None, address: str | None) -> None:
        if num_workers == 0:
            raise ConfigError("num_workers=0 works in this process; leave it out for every CPU of the Ray cluster")
        self._num_workers, self._address = num_workers, address

    def share(self, units: Sequence[int]) -> list[int]:
        """All of them."""
        return list(units)

    def nodes(self) -> list[str]:
        """All node folders."""
        return []

    def warm_up(self, *_: object) -> AbstractContextManager[None]:
        """Nothing: joining a cluster takes longer than loading engines, and comes when there is work for it."""
        return contextlib.nullcontext()

    def run(self, job: Job, units: Sequence[int], on_result: Callable[[UnitResult], None]) -> None:
        """See `Executor.run`."""
        try:
            import ray
        except ImportError as error:
            raise ConfigError("executor=ray needs Ray: pip install 'pretrainkit[ray]'") from error
        started = not ray.is_initialized()
        if started:
            with _own_sigterm():
                self._connect(ray)
        try:
            _Tasks(ray, job, units, self._num_workers).run(on_result)
        finally:
            if started:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        # The package travels with the job, so that nodes need only its dependencies. No environment variables: Ray
        # writes them to a log that everybody may read.
        options: dict[str, Any] = {
            "runtime_env": {"py_modules": [str(Path(__file__).resolve().parents[1])]},
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        try:
            ray.init(address=self._address or "auto", **options)
            return
        except ConnectionError as error:
            if self._address is not None:
                raise LaunchError(f"ray_address={self._address}: {error}") from error
        logger.info("no Ray cluster found; starting one on this machine")
        ray.init(include_dashboard=False, num_cpus=self._num_workers, **options)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray puts its own there, which ends with exit code 15 and says nothing."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class _Tasks:
    """Tasks in flight, retries and duplicates."""

    def __init__(self, ray: Any, job: Job, units: Sequence[int], num_workers: int | None) -> None:
        self._ray, self._job = ray, job
        self._queue = collections.deque(units)
        self._unfinished = set(units)
        self._in_flight: dict[Any, tuple[int, float]] = {}  # task -> (unit, when it was handed out)
        self._deaths: collections.Counter[int] = collections.Counter()
        self._durations: list[float] = []
        self._num_workers = num_workers
        # max_retries=0: a retry of Ray's own would not count deaths, and could wait for ever.
        self._task = ray.remote(num_cpus=1, max_retries=0)(_run_unit)

    def run(self, on_result: Callable[[UnitResult], None]) -> None:
        """Until every unit is reported."""
        while self._unfinished:
            self._hand_out()
            ready, _ = self._ray.wait(list(self._in_flight), timeout=_POLL_S)
            for task in ready:
                result = self._take(task)
                if result is not None and result.unit in self._unfinished:
                    self._unfinished.discard(result.unit)
                    on_result(result)
            if not ready:
                self._adopt(on_result)
                self._duplicate_stragglers()
        for task in self._in_flight:
            self._ray.cancel(task, force=True)

    def _capacity(self) -> int:
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        return _TASKS_PER_CPU * (cpus if self._num_workers is None else min(cpus, self._num_workers))

    def _hand_out(self) -> None:
        capacity = self._capacity()
        while self._queue and len(self._in_flight) < capacity:
            unit = self._queue.popleft()
            if unit in self._unfinished:
                self._in_flight[self._task.remote(self._job, unit)] = (unit, time.monotonic())

    def _take(self, task: Any) -> UnitResult | None:
        """A task's result, or None when its worker or node died; then its unit is queued again."""
        from ray.exceptions import RayError

        unit, start = self._in_flight.pop(task)
        try:
            result: UnitResult | PretrainKitError = self._ray.get(task)
        except RayError as error:
            if unit in self._unfinished:
                self._note_death(unit, error)
            return None
        if isinstance(result, PretrainKitError):
            raise result
        self._durations.append(time.monotonic() - start)
        return result

    def _note_death(self, unit: int, error: Exception) -> None:
        self._deaths[unit] += 1
        reason = " ".join(str(error).split())[:300]
        if self._deaths[unit] >= MAX_DEATHS_PER_UNIT:
            raise LaunchError(f"unit {unit} failed {MAX_DEATHS_PER_UNIT} times, last: {reason}")
        logger.warning("unit %d was lost (%s); trying again", unit, reason)
        self._queue.appendleft(unit)

    def _adopt(self, on_result: Callable[[UnitResult], None]) -> None:
        """Take units whose records stand though their task is silent: its node may be cut off from the cluster."""
        from pretrainkit.units.nodes import finished_units

        overdue = {unit for unit, start in self._in_flight.values() if time.monotonic() - start > self._patience()}
        if not overdue & self._unfinished:
            return
        for unit, record in finished_units(self._job.output_dir, self._plan()).items():
            if unit in overdue & self._unfinished:
                self._unfinished.discard(unit)
                counts = record.splits.values()
                on_result(
                    UnitResult(
                        unit=unit,
                        text_bytes=sum(c.text_bytes for c in counts),
                        tokens=sum(c.tokens for c in counts),
                        failures=record.failures,
                    )
                )

    def _plan(self) -> Any:
        from pretrainkit.plan import PLAN_FILENAME, Plan
        from pretrainkit.storage import join, read_bytes

        return Plan.from_json(read_bytes(join(self._job.output_dir, PLAN_FILENAME)).decode())

    def _patience(self) -> float:
        median = statistics.median(self._durations) if self._durations else 0.0
        return max(_STRAGGLER_MIN_S, _STRAGGLER_FACTOR * median)

    def _duplicate_stragglers(self) -> None:
        """In the tail, hand out a second time what takes far too long."""
        if self._queue:
            return
        copies = collections.Counter(unit for unit, _ in self._in_flight.values())
        now = time.monotonic()
        for unit, start in list(self._in_flight.values()):
            if unit in self._unfinished and copies[unit] == 1 and now - start > self._patience():
                self._queue.append(unit)


@functools.lru_cache(maxsize=1)
def _runner(job: Job, node: str) -> UnitRunner:
    """The runner of this worker process; Ray reuses the process, so the tokenizer is loaded once."""
    return UnitRunner(job, node, preload(job.tokenizer_dir, ()))


def _run_unit(job: Job, unit: int) -> UnitResult | PretrainKitError:
    """One unit, in a Ray worker; a user's mistake comes back as a value, so that Ray does not wrap it."""
    import os

    import ray

    from pretrainkit.topology import node_name

    node = f"{node_name(os.environ)}-{ray.get_runtime_context().get_node_id()[:8]}"
    try:
        return _runner(job, node).run(unit)
    except PretrainKitError as error:
        return error
