"""How far the work is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


class Progress:
    """Rates and time left of a job.

    Args:
        total_bytes: Text in all, as planned.
        done_bytes: Text of units that were finished before.
        units: Units in all.
        done_units: Units that were finished before.
        clock: Seconds; a test gives its own.
    """

    def __init__(
        self,
        *,
        total_bytes: int,
        done_bytes: int,
        units: int,
        done_units: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._planned_done, self._at_start = total_bytes, done_bytes, done_bytes
        self._units, self._units_done = units, done_units
        self._clock = clock
        self._start = self._last_line = clock()
        self._text_bytes = self._tokens = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, file=sys.stderr)

    def add(self, planned_bytes: int, text_bytes: int, tokens: int) -> None:
        """A unit is done: its planned size, and what it turned out to hold."""
        self._planned_done += planned_bytes
        self._units_done += 1
        self._text_bytes += text_bytes
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate(self._tokens):,.0f} tokens/s", refresh=False)
            self._bar.update(planned_bytes)
        elif self._clock() - self._last_line >= _LOG_INTERVAL_S:
            self._last_line = self._clock()
            logger.info("%s", self.line())

    def line(self) -> str:
        """One line: share done, units, rates, time left."""
        share = self._planned_done / self._total if self._total else 1.0
        rate = self._rate(self._planned_done - self._at_start)
        left = (self._total - self._planned_done) / rate if rate else 0.0
        return (
            f"{share:6.1%}  unit {self._units_done:,} of {self._units:,}  {self._rate(self._tokens):,.0f} tokens/s  "
            f"{self._rate(self._text_bytes) / 1e6:,.1f} MB/s  {in_words(left)} left"
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _rate(self, count: int) -> float:
        return count / max(1e-9, self._clock() - self._start)


def in_words(seconds: float) -> str:
    """A duration as people say it: 45 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
