"""Which sample comes when: a pure function of (seed, position), with random access and bounded memory.

Comes in: how many blocks each source has, in which segments they lie on disk, and the mixture's weights. Goes out: for
any global sample number, a source and a block of it. Guarantee: nothing but the seed, the sources' layout and the
number enters, so ranks, loader threads, restarts and epochs cannot change the order; within an epoch of a source every
block comes exactly once; every prefix of a mixture holds each source's share to within one sample per source.

A whole-dataset shuffle in two steps: an epoch visits all segments (neighbouring blocks, about a mebibyte) in a random
order, and mixes the blocks of `WINDOW_SEGMENTS` segments at a time. So neighbours in a batch come from all over the
dataset, while at any time only one window of it is needed: about a gibibyte of a remote dataset, read once per epoch.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Segments whose blocks are mixed at a time.
WINDOW_SEGMENTS = 1024
# Longest period of a mixture's pattern: weights are exact when they are fractions with a common denominator up to this,
# as written-out decimals are, and else right to one part in a million.
MAX_PERIOD = 1 << 20


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on the key alone, (count,) int64.

    Sorting raw generator output, because NumPy promises the same raw stream for ever, and the same `permutation` for
    one version only.
    """
    bits: np.ndarray = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _Epoch:
    """One epoch's walk over a source."""

    segments: np.ndarray  # (segments,) the segments in the order of the walk
    window_starts: np.ndarray  # (windows + 1,) samples of the epoch before each window


class SourceOrder:
    """The order of one source's blocks over all its epochs.

    Args:
        segment_starts: (segments + 1,) int64, first block of each segment; the last entry is the number of blocks.
        seed: The run's seed.
        source: Number that tells the source's order from other sources'.
        shuffle: False gives the order on disk in every epoch.
    """

    def __init__(self, segment_starts: np.ndarray, *, seed: int, source: int, shuffle: bool) -> None:
        self.num_blocks = int(segment_starts[-1])
        self._starts = segment_starts
        self._key = (seed, source)
        self._shuffle = shuffle
        # Threads of a loader ask for neighbouring positions: they share what the others have worked out.
        self._lock = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=3)(self._make_window)

    def blocks(self, positions: np.ndarray) -> np.ndarray:
        """The blocks at these positions of the source's endless walk.

        Args:
            positions: (n,) int64; position p is sample p % num_blocks of epoch p // num_blocks.

        Returns:
            (n,) int64 block indices.
        """
        epochs, offsets = np.divmod(positions, self.num_blocks)
        if not self._shuffle:
            return offsets
        result = np.empty_like(offsets)
        first, last = int(positions.min()), int(positions.max())
        while first <= last:  # window by window; a batch lies in one or two
            epoch, window, start, stop = self._window_at(first)
            with self._lock:
                blocks = self._window(epoch, window)
            inside = (epochs == epoch) & (offsets >= start) & (offsets < stop)
            result[inside] = blocks[offsets[inside] - start]
            first = epoch * self.num_blocks + stop
        return result

    def window_segments(self, position: int, ahead: int = 0) -> np.ndarray:
        """The segments of the window that holds this position, or of the window `ahead` places later, unordered."""
        if not self._shuffle:
            offset = position % self.num_blocks
            first = int(np.searchsorted(self._starts, offset, side="right")) - 1 + ahead * WINDOW_SEGMENTS
            return np.arange(first, min(first + WINDOW_SEGMENTS, len(self._starts) - 1))
        epoch, window, _, _ = self._window_at(position)
        windows = -(-(len(self._starts) - 1) // WINDOW_SEGMENTS)
        epoch, window = epoch + (window + ahead) // windows, (window + ahead) % windows
        with self._lock:
            return self._epoch(epoch).segments[window * WINDOW_SEGMENTS : (window + 1) * WINDOW_SEGMENTS]

    def window_number(self, position: int) -> tuple[int, int]:
        """(epoch, window) that holds this position; what changes when other segments are needed."""
        if not self._shuffle:
            return position // self.num_blocks, position % self.num_blocks * WINDOW_SEGMENTS // self.num_blocks
        epoch, window, _, _ = self._window_at(position)
        return epoch, window

    def _window_at(self, position: int) -> tuple[int, int, int, int]:
        """(epoch, window, first and last + 1 sample of the window within its epoch)."""
        epoch, offset = divmod(position, self.num_blocks)
        with self._lock:
            starts = self._epoch(epoch).window_starts
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, window, int(starts[window]), int(starts[window + 1])

    def _make_epoch(self, epoch: int) -> _Epoch:
        segments = random_order(len(self._starts) - 1, *self._key, epoch, 0)
        ends = np.cumsum(np.diff(self._starts)[segments])
        # The end of every window's last segment.
        lasts = np.minimum(np.arange(WINDOW_SEGMENTS, len(ends) + WINDOW_SEGMENTS, WINDOW_SEGMENTS), len(ends)) - 1
        return _Epoch(segments, np.concatenate([[0], ends[lasts]]))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        chosen = self._epoch(epoch).segments[window * WINDOW_SEGMENTS : (window + 1) * WINDOW_SEGMENTS]
        starts = self._starts[chosen]
        counts = self._starts[chosen + 1] - starts
        # The segments' blocks one after the other, then mixed.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        blocks = np.repeat(starts, counts) + within
        mixed: np.ndarray = blocks[random_order(len(blocks), *self._key, epoch, 1 + window)]
        return mixed


class Mixture:
    """Which source each global sample comes from: a fixed pattern, repeated, that spreads every source evenly.

    Args:
        weights: One positive number per source; only their ratios matter.
        since: First global sample of this mixture; those before it came from other ones.
        before: Samples taken from each source before that; None takes none.
    """

    def __init__(self, weights: Sequence[float], *, since: int = 0, before: Sequence[int] | None = None) -> None:
        self._since = since
        self._before = np.array(before or [0] * len(weights), dtype=np.int64)
        self.counts = _period_counts(weights)
        period = int(self.counts.sum())
        # The k-th of c samples of a source is due at (k + 1/2) / c of the period.
        source = np.repeat(np.arange(len(weights)), self.counts)
        rank = np.arange(period) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        due = np.argsort((rank + 0.5) / self.counts[source], kind="stable")
        self.period = period
        self._source = source[due].astype(np.uint16)
        self._rank = rank[due].astype(np.int32)

    def split(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, position within that source) of each global sample number from `since` on, both (n,) int64."""
        samples = samples - self._since
        if len(self.counts) == 1:
            return np.zeros_like(samples), samples + self._before[0]
        periods, offsets = np.divmod(samples, self.period)
        sources = self._source[offsets].astype(np.int64)
        return sources, self._before[sources] + periods * self.counts[sources] + self._rank[offsets]

    def samples_per_source(self, samples: int) -> list[int]:
        """How many of the first `samples` global samples, at least `since`, come from each source; exact."""
        periods, rest = divmod(samples - self._since, self.period)
        begun = np.bincount(self._source[:rest], minlength=len(self.counts))
        return [int(count) for count in self._before + periods * self.counts + begun]


def _period_counts(weights: Sequence[float]) -> np.ndarray:
    """Samples of each source in one period, (sources,) int64."""
    fractions = [Fraction(str(weight)) for weight in weights]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return np.array([int(share * period) for share in shares])
    # Round down, then give what is left to those who lost most; nobody goes below one.
    counts = [max(1, int(share * MAX_PERIOD)) for share in shares]
    lost = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_PERIOD)
    for index in lost[: max(0, MAX_PERIOD - sum(counts))]:
        counts[index] += 1
    return np.array(counts)
