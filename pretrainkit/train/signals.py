"""Stopping: a signal or the clock asks on one rank, and all ranks stop after the same step.

Comes in: SIGTERM, SIGUSR1, Ctrl+C, the time limit. Goes out: a verdict that every rank reads at the same step.
Guarantee: asking never interrupts a step; the vote travels between hosts while the devices compute, and its result is
read one step later, so nobody waits for it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pretrainkit.launchers import PASSED_ON, begin_to_listen, is_second_press, stop_asked

NOTHING, TIME_IS_UP = 0, 1  # below every signal we watch but SIGHUP, which we do not


class SignalWatch:
    """The first watched signal is remembered; a second Ctrl+C interrupts at once."""

    def __init__(self) -> None:
        self._heard: list[tuple[int, float]] = []

    @property
    def received(self) -> int:
        """Number of the first signal, or NOTHING."""
        return self._heard[0][0] if self._heard else stop_asked()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if is_second_press(number, self._heard):
            signal.default_int_handler(number, frame)

    def arrives_within(self, seconds: float) -> bool:
        """Wait for a signal, at most that long; whether there is one."""
        until = time.monotonic() + seconds
        while not self.received and time.monotonic() < until:
            time.sleep(0.05)
        return bool(self.received)

    @contextlib.contextmanager
    def watching(self) -> Iterator[SignalWatch]:
        """Watch within this block, then put the former handlers back."""
        begin_to_listen()
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers; Ray runs training in another one
            return
        before = {number: signal.signal(number, self._remember) for number in PASSED_ON}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Ballot:
    """One small vote per step over the hosts.

    Args:
        group: gloo group for this alone; None with one rank.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._vote = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def cast(self, value: int) -> int:
        """Give this rank's vote of this step and get the highest of all ranks' from the step before."""
        if self._group is None:
            return value
        result = self.result()
        self._vote = torch.tensor(value)
        self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return result

    def result(self) -> int:
        """The highest vote of the step before; the same on every rank."""
        if self._work is None:
            return NOTHING
        self._work.wait()
        self._work = None
        return int(self._vote)
