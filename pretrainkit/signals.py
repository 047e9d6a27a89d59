"""Ctrl+C and SIGTERM end a job in order: an exception in the main thread, which every `finally` sees."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pretrainkit.errors import Interrupted


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
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface of handlers
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        received.append(number)
        # What every library passes on, and what no `except` for a bad file or a bad tokenizer takes.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    except KeyboardInterrupt as stopped:
        if not received:  # somebody's own
            raise
        name = signal.Signals(received[0]).name
        raise Interrupted(f"stopped by {name}; {how_to_go_on}", received[0]) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
