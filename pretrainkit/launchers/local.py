"""This machine alone: one process as it is, or one more per further device.

Guarantees: the first process that fails ends the others, and its error is the run's; a signal to this process reaches
all of them, once; none of them outlives it. The exit code tells what may be tried again from what must be mended.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import TRY_AGAIN, Interrupted, LaunchError, PretrainKitError
from pretrainkit.launchers import (
    PASSED_ON,
    ask_to_stop,
    is_second_press,
    pack_error,
    run_entry,
    training_listens,
    unpack_error,
)
from pretrainkit.launchers.slurm import variables
from pretrainkit.leave import leave
from pretrainkit.topology import Topology

_GRACE_S = 30.0  # for the others to end after one has failed
_HUNG_GRACE_S = 2.0  # after a hang, when nothing is saved; the others may be writing where they stand
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


@dataclass
class _Worker:
    """A process, seen from the one that started it."""

    process: Any
    orders: Connection
    """Takes the numbers of signals."""
    words: Connection
    """Gives the error that ended it."""
    error: PretrainKitError | None = None
    """What it gave."""
    overdue: bool = False
    """Killed by us, so that its end says nothing."""


def launch(entry: str, config: PretrainConfig, begun: float) -> None:
    """Run on every device of this machine.

    Raises:
        LaunchError: More devices than there are, or a process died.
        PretrainKitError: Whatever the first process to fail said.
    """
    count = num_processes(config)
    if count == 1:
        run_entry(entry, config, begun)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers: list[_Worker] = []
    with _passing_on(workers) as heard:
        with _ctrl_c_blocked():
            workers.extend(_start(entry, config, begun, rank, count, port) for rank in range(count))
        if heard:  # before all of them were there
            _order(workers, heard[0][0])
        failure = _first_failure(workers, heard)
    if failure is not None:
        raise failure


def num_processes(config: PretrainConfig) -> int:
    """Processes to run on this machine.

    Raises:
        LaunchError: More than there are GPUs.
    """
    if config.devices == 1:
        return 1
    import torch

    gpus = torch.cuda.device_count()
    if config.devices == "auto":
        return max(1, gpus)
    if gpus and config.devices > gpus:
        raise LaunchError(f"devices={config.devices}, but this machine has {gpus} GPUs; use at most that")
    return config.devices


def _start(entry: str, config: PretrainConfig, begun: float, rank: int, count: int, port: int) -> _Worker:
    place = Topology(launcher="torchrun", rank=rank, world_size=count, local_rank=rank, local_world_size=count)
    context = multiprocessing.get_context("spawn")
    orders, send_orders = context.Pipe(duplex=False)
    words, send_words = context.Pipe(duplex=False)
    arguments = (entry, config, begun, variables(place, "127.0.0.1", port), orders, send_words, os.getpid())
    process = context.Process(target=_work, args=arguments, daemon=True, name=f"rank-{rank}")
    process.start()
    orders.close()
    send_words.close()
    return _Worker(process, send_orders, words)


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Start processes that never hear Ctrl+C, which a terminal sends to all of its foreground: it is our business.

    They stay in our group, so that Ctrl+Z and `fg` hold up and continue all of us.
    """
    resource_tracker.ensure_running()  # at its start, which a process's would be, it unblocks Ctrl+C
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _passing_on(workers: list[_Worker]) -> Iterator[list[tuple[int, float]]]:
    """Pass every signal on to the workers, and end them at a second Ctrl+C; gives the signals and when they came.

    Raises:
        Interrupted: At a second Ctrl+C, in place of what the workers' ends would mean.
    """
    heard: list[tuple[int, float]] = []
    at_once = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal at_once
        if is_second_press(number, heard):
            at_once = True
            for worker in workers:
                worker.process.kill()
        else:
            _order(workers, number)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in PASSED_ON} if in_main else {}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if at_once:
        raise Interrupted("stopped by SIGINT at once; go on from the last checkpoint with --resume=auto", signal.SIGINT)


def _order(workers: list[_Worker], number: int) -> None:
    """Have the workers stop as that signal would."""
    for worker in workers:
        with contextlib.suppress(OSError):  # it is gone
            worker.orders.send_bytes(bytes([number]))


def _first_failure(workers: list[_Worker], heard: list[tuple[int, float]]) -> PretrainKitError | None:
    """Wait until all have ended; after the first failure the others get some time to end by themselves."""
    failures: list[PretrainKitError] = []
    grace_s: float | None = None
    waiting = list(workers)
    while waiting:
        words = [worker.words for worker in waiting if not worker.words.closed]
        if not wait([worker.process.sentinel for worker in waiting] + words, timeout=grace_s):
            for worker in waiting:
                worker.overdue = True
                worker.process.kill()
        # Of ranks that ended at the same time, those that were killed, with codes below 0, made the others fail.
        for worker in sorted(waiting, key=lambda worker: worker.process.exitcode or 0):
            if not worker.process.is_alive():
                waiting.remove(worker)
            failure = _failure(worker, heard)
            if failure is None:
                continue
            failures.append(failure)
            grace_s = _HUNG_GRACE_S if worker.process.exitcode == TRY_AGAIN else grace_s or _GRACE_S
            if not isinstance(failure, Interrupted):  # the others wait for it, or fail for lack of it
                _order(waiting, signal.SIGTERM)
    errors = [failure for failure in failures if not isinstance(failure, Interrupted)]
    return next(iter(errors + failures), None)


def _failure(worker: _Worker, heard: list[tuple[int, float]]) -> PretrainKitError | None:
    """What is new about a worker's end: nothing, its error, or how it died."""
    code = worker.process.exitcode  # asked for first: what it said, it said before
    if not worker.words.closed and worker.words.poll():
        with contextlib.suppress(EOFError):
            worker.error = unpack_error(worker.words.recv_bytes())
        worker.words.close()
        if worker.error is not None:
            return worker.error
    if not code or worker.error is not None or worker.overdue:
        return None
    for number, _ in heard:
        if code in (-number, 128 + number):
            return Interrupted(f"stopped by {signal.Signals(number).name} before training began", number)
    why = ", which it does when a rank hangs" if code == TRY_AGAIN else ""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}{why}"
    failure = LaunchError(f"{worker.process.name} {how}; its last lines are above. Resume with --resume=auto")
    failure.exit_code = code if code > 0 else TRY_AGAIN
    return failure


def _work(
    entry: str,
    config: PretrainConfig,
    begun: float,
    environment: dict[str, str],
    orders: Connection,
    words: Connection,
    parent: int,
) -> None:
    """A worker's main function."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked to die with it
        os._exit(1)
    threading.Thread(target=_obey, args=(orders,), name="orders", daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.update(environment)
    try:
        run_entry(entry, config, begun)
    except PretrainKitError as error:
        words.send_bytes(pack_error(error))
        leave(error.exit_code)
    leave(0)


def _obey(orders: Connection) -> None:
    """Stop as the parent says: training after its step; before there is any, at once."""
    with contextlib.suppress(EOFError):  # nothing more will come
        while True:
            number = orders.recv_bytes()[0]
            if not training_listens():
                os._exit(128 + number)
            ask_to_stop(number)
