"""Executor `local`: one worker process per CPU on this machine, each on a socket of its own."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pretrainkit.errors import ConfigError, LaunchError, PretrainKitError
from pretrainkit.executors import MAX_DEATHS_PER_UNIT
from pretrainkit.topology import granted_cpus, node_name
from pretrainkit.unit import Job, UnitResult, UnitRunner

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 2.0


@dataclass(kw_only=True)
class _Worker:
    """One worker process and what it is doing."""

    process: subprocess.Popen[bytes]
    connection: Connection
    unit: int | None = None
    """Unit in its hands, or None before it is ready and when nothing is left."""


class LocalExecutor:
    """Runs units in processes of this machine; see `Executor`."""

    exclusive = True

    def __init__(self, num_workers: int | None, address: str | None) -> None:
        if address is not None:
            raise ConfigError(f"ray_address={address} is for --executor=ray; drop it or choose that executor")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"num_workers={num_workers} is negative; give 0 or more, or leave it out for all CPUs")
        self._num_workers = granted_cpus(os.environ) if num_workers is None else num_workers

    def share(self, units: Sequence[int]) -> list[int]:
        """All of them."""
        return list(units)

    def nodes(self) -> list[str]:
        """All node folders: nobody else is there."""
        return []

    def run(self, job: Job, units: Sequence[int], on_result: Callable[[UnitResult], None]) -> None:
        """See `Executor.run`."""
        node = node_name(os.environ)
        if self._num_workers == 0:
            runner = UnitRunner(job, node)
            for unit in units:
                on_result(runner.run(unit))
            return
        pool = _Pool(job, node, units)
        with pool.running(min(self._num_workers, len(units))):
            while pool.unfinished:
                for result in pool.next_results():
                    on_result(result)


class _Pool:
    """Workers, the queue of units, and the count of deaths."""

    def __init__(self, job: Job, node: str, units: Sequence[int]) -> None:
        self._hello = (job, node)
        self._queue = collections.deque(units)
        self._deaths: collections.Counter[int | None] = collections.Counter()
        self._workers: dict[Connection, _Worker] = {}
        self.unfinished = len(units)

    @contextlib.contextmanager
    def running(self, num_workers: int) -> Iterator[None]:
        """Workers while the block runs; none afterwards, however it ends."""
        try:
            for _ in range(num_workers):
                self._start()
            yield
        finally:
            self._stop_all()

    def next_results(self) -> Iterator[UnitResult]:
        """Wait until workers have something to say; their results."""
        for ready in wait(list(self._workers)):
            assert isinstance(ready, Connection)  # nothing else was waited for
            worker = self._workers[ready]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if isinstance(message, PretrainKitError | OSError):
                raise message
            if message is not None:
                self._deaths.pop(worker.unit, None)
                self.unfinished -= 1
                yield message
            self._hand_out(worker)

    def _hand_out(self, worker: _Worker) -> None:
        worker.unit = self._queue.popleft() if self._queue else None
        if worker.unit is not None:
            # A worker that has just died: its end of file is waited for next.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send(worker.unit)

    def _bury(self, worker: _Worker) -> None:
        """Take note of a death, put the unit back, start another worker."""
        del self._workers[worker.connection]
        worker.connection.close()
        code = worker.process.wait()
        self._deaths[worker.unit] += 1
        what = "while starting" if worker.unit is None else f"on unit {worker.unit}"
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        if self._deaths[worker.unit] >= MAX_DEATHS_PER_UNIT:
            raise LaunchError(
                f"{MAX_DEATHS_PER_UNIT} workers died {what} ({how}{hint}); plan.json says which rows that is"
                if worker.unit is not None
                else f"{MAX_DEATHS_PER_UNIT} workers died {what} ({how}{hint})"
            )
        logger.warning("a worker died %s (%s%s); trying again", what, how, hint)
        if worker.unit is not None:
            self._queue.appendleft(worker.unit)
        if self._queue:
            self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "pretrainkit.executors.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            ours.close()
            raise LaunchError(f"cannot start a worker process: {error}") from error
        finally:
            theirs.close()
        connection = Connection(ours.detach())
        self._workers[connection] = _Worker(process=process, connection=connection)
        # It may have died already; its end of file is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(self._hello)

    def _stop_all(self) -> None:
        """Close every connection, which ends the workers; kill what does not end."""
        for worker in self._workers.values():
            worker.connection.close()
        for worker in self._workers.values():
            _end(worker.process)
        self._workers.clear()


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(_STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
