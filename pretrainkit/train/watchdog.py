"""A rank that hangs is named, with its stack, and the run ends instead of waiting for ever.

Comes in: a sign of life per step and per phase. Goes out: nothing while all is well. Guarantee: works without the main
thread, which is what hangs: a thread of its own watches the clock, writes every stack of the process, says which rank
has come least far, and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
_FOLDER = "watchdog"


class Watchdog:
    """Watches one process.

    Args:
        out_dir: The run's folder, seen by every rank.
        rank: This process's.
        timeout_s: Longest time without a sign of life; None watches nothing.
    """

    def __init__(self, out_dir: Path, rank: int, timeout_s: float | None) -> None:
        self._folder = out_dir / _FOLDER
        self._rank = rank
        self._timeout_s = timeout_s
        self._signs = 0  # of life so far; every rank gives the same ones, so that the fewest are the least far
        self._step = 0
        self._phase = "starting"
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched = 0  # the thread that trains

    def start(self) -> None:
        """Begin to watch."""
        for path in self._folder.glob(f"rank-{self._rank:05d}.*"):
            path.unlink(missing_ok=True)  # of an earlier process of this run
        if self._timeout_s is not None:
            self.alive(self._step, self._phase)
            self._watched = threading.get_ident()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()

    def alive(self, step: int, phase: str) -> None:
        """A sign of life: what this rank begins to do now."""
        self._signs += 1
        self._step, self._phase, self._last = step, phase, time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        assert self._timeout_s is not None
        while not self._done.wait(min(self._timeout_s / 10, 10.0)):
            if time.monotonic() - self._last > self._timeout_s:
                self._give_up()

    def _give_up(self) -> None:
        own = {
            "rank": self._rank, "step": self._step, "phase": self._phase, "signs": self._signs,
            "waits": _waits_for_others(sys._current_frames().get(self._watched)),
        }  # fmt: skip
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / f"rank-{self._rank:05d}.stack", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        (self._folder / f"rank-{self._rank:05d}.json").write_text(json.dumps(own))
        # The ranks that wait in a collective for the one that hangs time out within one round of watching of each
        # other.
        time.sleep(min(self._timeout_s or 0, 30.0) / 5)
        reports = [json.loads(path.read_text()) for path in sorted(self._folder.glob("rank-*.json"))]
        first = min(reports, key=_progress)
        stack = self._folder / f"rank-{first['rank']:05d}.stack"
        logger.error(
            "error: rank %d hangs: no progress for %.0f s in step %d while %s; its stack is in %s; add --resume=auto",
            first["rank"], self._timeout_s, first["step"], first["phase"], stack,
        )  # fmt: skip
        if self._rank == first["rank"]:
            faulthandler.dump_traceback(sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _progress(report: dict[str, Any]) -> tuple[int, int, bool]:
    """Least far first; among equals, those that wait for the others come after the one that does something else."""
    return report["signs"], report["step"], report["waits"]


def _waits_for_others(frame: FrameType | None) -> bool:
    """Whether a thread is in a collective, or in a backward pass, where collectives leave no frame of their own."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in ("torch/distributed/", "torch/autograd/")):
            return True
        frame = frame.f_back
    return False
