"""This machine alone: one process as it is, or one more per further device.

Guarantees: the first process that fails ends the others, and its error is the run's; a signal to this process reaches
all of them; none of them outlives it.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import Interrupted, LaunchError, PretrainKitError
from pretrainkit.launchers import PASSED_ON, pack_error, run_entry, unpack_error
from pretrainkit.launchers.slurm import variables
from pretrainkit.topology import Topology

_GRACE_S = 30.0  # for the others to end after one has failed
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


def launch(entry: str, config: PretrainConfig) -> None:
    """Run on every device of this machine.

    Raises:
        LaunchError: More devices than there are, or a process died.
        PretrainKitError: Whatever the first process to fail said.
    """
    count = num_processes(config)
    if count == 1:
        run_entry(entry, config)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    for rank in range(count):
        place = Topology(launcher="torchrun", rank=rank, world_size=count, local_rank=rank, local_world_size=count)
        receive, send = context.Pipe(duplex=False)
        arguments = (entry, config, variables(place, "127.0.0.1", port), send, os.getpid())
        worker = context.Process(target=_work, args=arguments, daemon=True, name=f"rank-{rank}")
        worker.start()
        send.close()
        workers.append((worker, receive))
    _attend(workers)


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


def _attend(workers: list[tuple[Any, Connection]]) -> None:
    """Wait for all workers, pass signals on, and raise the first failure."""
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        _send(workers, number)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in PASSED_ON} if in_main else {}
    try:
        failure = _first_failure(workers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and (failure is None or isinstance(failure, LaunchError)):  # before the workers listened
        raise Interrupted(f"stopped by {signal.Signals(received[0]).name} before training began", received[0])
    if failure is not None:
        raise failure


def _send(workers: list[tuple[Any, Connection]], number: int) -> None:
    for worker, _ in workers:
        if worker.is_alive():
            os.kill(worker.pid, number)


def _first_failure(workers: list[tuple[Any, Connection]]) -> PretrainKitError | None:
    """Wait until all have ended; after the first failure the others get some time to end by themselves."""
    failure: PretrainKitError | None = None
    waiting = {worker.sentinel: (worker, receive) for worker, receive in workers}
    while waiting:
        ended = wait(list(waiting), timeout=None if failure is None else _GRACE_S)
        for sentinel in ended or list(waiting):
            worker, receive = waiting.pop(sentinel)
            if worker.is_alive():  # the time is over
                worker.kill()
            worker.join()
            failure = failure or _failure(worker, receive)
        if isinstance(failure, LaunchError):  # one died; the others wait for it
            _send(workers, signal.SIGTERM)
    return failure


def _failure(worker: Any, receive: Connection) -> PretrainKitError | None:
    """What a finished worker has to say: None, its error, or how it died."""
    if receive.poll():
        try:
            return unpack_error(receive.recv_bytes())
        except EOFError:
            pass
    if worker.exitcode:
        how = f"was killed by signal {-worker.exitcode}" if worker.exitcode < 0 else f"ended with {worker.exitcode}"
        return LaunchError(f"{worker.name} {how}; its last lines are above. Resume with --resume=auto")
    return None


def _work(entry: str, config: PretrainConfig, environment: dict[str, str], send: Connection, parent: int) -> None:
    """A worker's main function."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked to die with it
        os._exit(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.update(environment)
    try:
        run_entry(entry, config)
    except PretrainKitError as error:
        send.send_bytes(pack_error(error))
        sys.exit(error.exit_code)
