"""Many small file operations at a time, in order, with a word on how far it is when it takes long."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_THREADS = 8
# Files per task of a thread: one by one, the hand-over costs more than a link.
_BATCH = 64
_QUIET_S = 2.0
_LOG_INTERVAL_S = 10.0

_T = TypeVar("_T")
_R = TypeVar("_R")


def in_threads(function: Callable[[_T], _R], items: Sequence[_T], doing: str, batch: int = _BATCH) -> list[_R]:
    """Results in order. Threads, because what takes time here is the file system, often one far away.

    Args:
        function: Done for each item; when one raises, what has not begun never begins.
        items: What to do it for.
        doing: Words for the progress line.
        batch: Items per task; 1 where each one takes long.
    """
    at_work, stopped = threading.Semaphore(_THREADS), threading.Event()

    def run(start: int) -> list[_R]:
        results: list[_R] = []
        with at_work:
            for item in items[start : start + batch]:
                if stopped.is_set():
                    break
                results.append(function(item))
        return results

    pool = ThreadPoolExecutor(_THREADS)
    try:
        return _with_progress(pool.map(run, range(0, len(items), batch)), len(items), doing)
    finally:
        # On an error or Ctrl+C, nobody writes after this returns; nor does a thread that was being started when the
        # signal came, of which the pool does not know.
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for _ in range(_THREADS):
            at_work.acquire()


def _with_progress(batches: Iterable[list[_R]], total: int, doing: str) -> list[_R]:
    """Collect results; after two seconds say how far it is: a bar on a terminal, a line now and then in a log."""
    from tqdm import tqdm

    collected: list[_R] = []
    bar: Any = tqdm(
        total=total, desc=doing, delay=_QUIET_S, unit=" chunks", disable=not sys.stderr.isatty(), leave=False
    )
    next_line = time.monotonic() + _QUIET_S
    with bar:
        for results in batches:
            collected += results
            bar.update(len(results))
            if bar.disable and time.monotonic() >= next_line:
                logger.info("%s: %s of %s", doing, f"{len(collected):,}", f"{total:,}")
                next_line = time.monotonic() + _LOG_INTERVAL_S
    return collected
