"""Processes that are born by fork, killed on a schedule, and never lost sight of.

The harness is the reaper of everything below it: a worker whose driver is killed becomes a child of the harness, so
"no process is left" can be waited for instead of guessed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What changes a disk. Source: Python's table of audit events.
_CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SCHEDULER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID")


def become_reaper() -> None:
    """Have orphans below this process become its children."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have this process killed when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def start(function: Callable[[], Any], log: Path, environ: Mapping[str, str], die_at: int | None = None) -> int:
    """Fork a process in a session of its own that runs `function`; exit code 0, the error's, or 1 with a traceback.

    Args:
        function: What it runs.
        log: File its standard output and error are appended to.
        environ: Variables it has besides ours.
        die_at: It kills itself right before this change of the disk, counted from 1.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for name in _SCHEDULER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environ)
        if die_at is not None:
            die_at_change(die_at)
        function()
        code = 0
    except BaseException as error:  # noqa: BLE001 - a fork must never return into its parent's code
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_at_change(count: int) -> None:
    """SIGKILL this process right before its `count`-th change of the disk."""
    left, me = count, os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if os.getpid() != me:  # a fork inherits its parent's hooks
            return
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or event in _CHANGES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def wait_or_kill(pids: list[int], after_s: float | None, choose: Callable[[list[int]], list[int]]) -> list[int]:
    """Wait for drivers; after `after_s` kill what `choose` picks among them. Exit codes, -9 for a killed one."""
    handles = {os.pidfd_open(pid): pid for pid in pids}
    deadline = None if after_s is None else time.monotonic() + after_s
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    alive = set(handles)
    while alive:
        left = None if deadline is None else max(0, deadline - time.monotonic()) * 1000
        ready = poll.poll(left)
        for handle, _ in ready:
            poll.unregister(handle)
            alive.discard(handle)
        if not ready:
            for victim in choose([handles[handle] for handle in alive]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            deadline = None
    codes = []
    for handle, pid in handles.items():
        os.close(handle)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def children_of(pid: int) -> list[int]:
    """Processes whose parent `pid` is; [] when it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def reap_orphans(within_s: float) -> list[int]:
    """Wait until no process is left below this one; those that are left after `within_s`, which are then killed."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
        except ChildProcessError:
            return []
    left = children_of(os.getpid())
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return left


class ForkedWorker:
    """Stands in for `subprocess.Popen` of a local worker: forks this process, which has imported everything already.

    Class attributes say which worker dies, and when: the `victim`-th one started, at its `die_at`-th change.
    """

    victim: int | None = None
    die_at = 0
    _started = 0

    def __init__(self, arguments: list[str], pass_fds: list[int], **_: Any) -> None:
        from pretrainkit.executors import worker

        ForkedWorker._started += 1
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            (descriptor,) = pass_fds
            # As subprocess does: whoever held its siblings' sockets would keep them from noticing a driver's death.
            os.closerange(3, descriptor)
            os.closerange(descriptor + 1, 1 << 16)
            if ForkedWorker._started == ForkedWorker.victim:
                die_at_change(ForkedWorker.die_at)
            worker.main(descriptor)
            code = 0
        except BaseException:  # noqa: BLE001 - likewise
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, timeout: float | None = None) -> int:
        """As in `subprocess.Popen`."""
        import subprocess

        if self.returncode is None:
            handle = os.pidfd_open(self.pid)
            try:
                ready, _, _ = select.select([handle], [], [], timeout)
            finally:
                os.close(handle)
            if not ready:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        """As in `subprocess.Popen`."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def pick_worker(generator: random.Random) -> Callable[[list[int]], list[int]]:
    """A choice for `wait_or_kill`: one child of one of the drivers."""

    def choose(drivers: list[int]) -> list[int]:
        workers = [child for driver in sorted(drivers) for child in sorted(children_of(driver))]
        return [generator.choice(workers)] if workers else []

    return choose
