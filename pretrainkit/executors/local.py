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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pretrainkit.errors import ConfigError, LaunchError, PretrainKitError
from pretrainkit.executors import MAX_DEATHS_PER_UNIT
from pretrainkit.topology import granted_cpus, node_name
from pretrainkit.units.runner import UnitRunner
from pretrainkit.units.work import Job, UnitResult

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 2.0
_UNITS_IN_HAND = 2


@dataclass(kw_only=True)
class _Worker:
    """One worker process and what it is doing."""

    process: subprocess.Popen[bytes]
    connection: Connection
    units: list[int] = field(default_factory=list)
    """Units in its hands: one being published, one being encoded."""


class LocalExecutor:
    """Runs units in processes of this machine; see `Executor`."""

    exclusive = True

    def __init__(self, num_workers: int | None, address: str | None) -> None:
        if address is not None:
            raise ConfigError(f"ray_address={address} is for --executor=ray; drop it or choose that executor")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"num_workers={num_workers} is negative; give 0 or more, or leave it out for all CPUs")
        self._num_workers = granted_cpus(os.environ) if num_workers is None else num_workers
        self._warm: _Pool | None = None

    def share(self, units: Sequence[int]) -> list[int]:
        """All of them."""
        return list(units)

    def nodes(self) -> list[str]:
        """All node folders: nobody else is there."""
        return []

    @contextlib.contextmanager
    def warm_up(self, tokenizer_dir: str, engines: Sequence[str], num_units: int) -> Iterator[None]:
        """See `Executor.warm_up`."""
        if self._num_workers == 0:
            yield
            return
        pool = _Pool(tokenizer_dir, engines)
        with pool.running(min(self._num_workers, num_units)):
            self._warm = pool
            try:
                yield
            finally:
                self._warm = None

    def run(self, job: Job, units: Sequence[int], on_result: Callable[[UnitResult], None]) -> None:
        """See `Executor.run`."""
        node = node_name(os.environ)
        if self._num_workers == 0:
            for result in UnitRunner(job, node).run_all(units):
                on_result(result)
            return
        pool, self._warm = self._warm or _Pool(job.tokenizer_dir, ()), None  # a second run starts afresh
        with pool.running(min(self._num_workers, len(units))):
            pool.begin(job, node, units)
            while pool.unfinished:
                for result in pool.next_results():
                    on_result(result)


class _Pool:
    """Workers, the queue of units, and the count of deaths."""

    def __init__(self, tokenizer_dir: str, engines: Sequence[str]) -> None:
        self._greetings: list[Any] = [(tokenizer_dir, tuple(engines))]
        self._queue: collections.deque[int] = collections.deque()
        self._deaths: collections.Counter[int | None] = collections.Counter()  # None: while starting
        self._workers: dict[Connection, _Worker] = {}
        self.unfinished = 0

    @contextlib.contextmanager
    def running(self, num_workers: int) -> Iterator[None]:
        """At least so many workers while the block runs; none afterwards, however it ends."""
        try:
            while len(self._workers) < num_workers:
                self._start()
            yield
        finally:
            self._stop_all()

    def begin(self, job: Job, node: str, units: Sequence[int]) -> None:
        """Give the workers their job."""
        self._greetings.append((job, node))
        self._queue.extend(units)
        self.unfinished = len(units)
        for connection in self._workers:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end of file comes next
                connection.send(self._greetings[-1])

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
                worker.units.remove(message.unit)
                self._deaths.pop(message.unit, None)
                self.unfinished -= 1
                yield message
            self._hand_out(worker)

    def _hand_out(self, worker: _Worker) -> None:
        """Keep a worker busy: the next unit is in its hands before it reports the one before."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; its end of file comes next
            while self._queue and len(worker.units) < self._depth(worker):
                worker.units.append(self._queue.popleft())
                worker.connection.send(worker.units[-1])
            if len(worker.units) < _UNITS_IN_HAND:
                worker.connection.send(None)

    def _depth(self, worker: _Worker) -> int:
        """One unit where two would leave others idle at the end, or blame a death on a bystander."""
        suspect = any(self._deaths[unit] for unit in [*worker.units, self._queue[0]])
        return 1 if suspect or len(self._queue) < len(self._workers) else _UNITS_IN_HAND

    def _bury(self, worker: _Worker) -> None:
        """Take note of a death, put the units back, start another worker."""
        del self._workers[worker.connection]
        worker.connection.close()
        code = worker.process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        how += "; out of memory?" if code == -signal.SIGKILL else ""
        in_hand: list[int | None] = [*worker.units] or [None]
        for unit in in_hand:
            what = "while starting" if unit is None else f"on unit {unit}"
            self._deaths[unit] += 1
            if self._deaths[unit] >= MAX_DEATHS_PER_UNIT:
                where = "" if unit is None else "; plan.json says which rows that is"
                raise LaunchError(f"{MAX_DEATHS_PER_UNIT} workers died {what} ({how}){where}")
            logger.warning("a worker died %s (%s); trying again", what, how)
        self._queue.extendleft(reversed(worker.units))
        if self._queue:
            self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        # Ctrl+C reaches the whole foreground group, and is the driver's business from a worker's first moment on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
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
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        connection = Connection(ours.detach())
        self._workers[connection] = _Worker(process=process, connection=connection)
        # It may have died already; its end of file is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for greeting in self._greetings:
                connection.send(greeting)

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
