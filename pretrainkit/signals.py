"""Ctrl+C and SIGTERM end a job in order: an exception in the main thread, which every `finally` sees."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pretrainkit.errors import Interrupted


class _Stopped(BaseException):
    """A signal came. Like KeyboardInterrupt, nothing that an `except` for a bad file or a bad tokenizer may take."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _StopError(BaseException):
    """A signal came. As Ctrl+C by itself: no `except` for errors may take it for a bad file or a bad tokenizer."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted` while the block runs; a second signal waits for the clean-up.

    Args:
        how_to_go_on: What to tell the user.

    Raises:
        Interrupted: A signal came.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface of handlers
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        raise _StopError(number)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    except _StopError as stopped:
        name = signal.Signals(stopped.number).name
        raise Interrupted(f"stopped by {name}; {how_to_go_on}", stopped.number) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
