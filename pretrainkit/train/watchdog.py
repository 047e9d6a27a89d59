"""A rank that hangs is named, with its stack, and the run ends instead of waiting for ever.

Comes in: a sign of life per step and per phase. Goes out: nothing while all is well. Guarantee: works without the main
thread, which is what hangs: a thread of its own watches the clock, writes every stack of the process, and ends it. A
second one sees that another rank gave up, and does the same, so that every rank which still runs says where it is: one
that says nothing is frozen or gone, and named first; else the one that has come least far is.
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

from pretrainkit.errors import TRY_AGAIN
from pretrainkit.topology import detect

logger = logging.getLogger(__name__)

_FOLDER = "watchdog"
_ROUND_S = 10.0  # between two looks, at most
_REPORTS_S = 60.0  # for the others' reports, at most: NFS shows another node's new file after up to 30 s


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
        self._giving_up = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._watched = 0  # the thread that trains

    def start(self) -> None:
        """Begin to watch; call before a barrier, behind which no report of an earlier process is left."""
        own = "*" if self._rank == 0 else f"{self._rank:05d}"  # there may have been more ranks
        for path in self._folder.glob(f"rank-{own}.*"):
            path.unlink(missing_ok=True)
        if self._timeout_s is not None:
            self.alive(self._step, self._phase)
            self._watched = threading.get_ident()
            # The clock is watched by one that touches no file: a file system may be what hangs.
            for look in (self._look_at_clock, self._look_at_others):
                self._threads.append(threading.Thread(target=look, daemon=True, name="watchdog"))
                self._threads[-1].start()

    def alive(self, step: int, phase: str) -> None:
        """A sign of life: what this rank begins to do now."""
        self._signs += 1
        self._step, self._phase, self._last = step, phase, time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _look_at_clock(self) -> None:
        assert self._timeout_s is not None
        while not self._done.wait(min(self._timeout_s / 10, _ROUND_S)):
            if time.monotonic() - self._last > self._timeout_s:
                self._give_up()

    def _look_at_others(self) -> None:
        assert self._timeout_s is not None
        while not self._done.wait(min(self._timeout_s / 10, _ROUND_S)):
            if self._signs > 1 and self._reported():  # past the barrier
                self._give_up()

    def _give_up(self) -> None:
        """Report, read what the others report, name one, and end the process."""
        assert self._timeout_s is not None
        self._giving_up.acquire()  # for good: one of the two threads is enough
        wait_s = min(self._timeout_s / 2, _REPORTS_S)
        emergency = threading.Timer(wait_s + 30.0, os._exit, [TRY_AGAIN])
        emergency.daemon = True
        emergency.start()  # should the file system hang, too
        try:
            self._report()
            world_size = detect(os.environ).world_size
            until = time.monotonic() + wait_s
            while len(self._reported()) < world_size and time.monotonic() < until:
                time.sleep(wait_s / 50)
            self._blame(world_size)
        finally:
            sys.stderr.flush()
            os._exit(TRY_AGAIN)

    def _report(self) -> None:
        """Leave where this rank stands, and its stacks."""
        own = {
            "rank": self._rank, "step": self._step, "phase": self._phase, "signs": self._signs,
            "silent_s": time.monotonic() - self._last,
            "waits": _waits_for_others(sys._current_frames().get(self._watched)),
        }  # fmt: skip
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._path(self._rank, "stack"), "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        draft = self._path(self._rank, "draft")
        draft.write_text(json.dumps(own))
        draft.replace(self._path(self._rank, "json"))  # the others read it at any moment

    def _reported(self) -> list[Path]:
        return sorted(self._folder.glob("rank-*.json"))

    def _path(self, rank: int, kind: str) -> Path:
        return self._folder / f"rank-{rank:05d}.{kind}"

    def _blame(self, world_size: int) -> None:
        """Say which rank holds up the run."""
        reports = [json.loads(path.read_text()) for path in self._reported()]
        first = min(reports, key=_progress)
        where = f"in step {first['step']} while {first['phase']}"
        stack = self._path(first["rank"], "stack")
        missing = sorted(set(range(world_size)) - {report["rank"] for report in reports})
        if missing and first["phase"] != "finishing":  # when ranks no longer wait for each other
            logger.error(
                "error: %s gave no sign for %.0f s; rank %d waits for it %s; its stack is in %s; add --resume=auto",
                _names(missing), first["silent_s"], first["rank"], where, stack,
            )  # fmt: skip
            return
        logger.error(
            "error: rank %d hangs: no progress for %.0f s %s; its stack is in %s; add --resume=auto",
            first["rank"], self._timeout_s, where, stack,
        )  # fmt: skip
        if self._rank == first["rank"]:
            faulthandler.dump_traceback(sys.stderr)


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


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
