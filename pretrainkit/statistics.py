"""Counts and document-length histograms, put into words and bars.

Comes in: the histograms that records and `metadata.json` hold, `{"2^k": documents of 2^k .. 2^(k+1) - 1 tokens}`. Goes
out: quantile bounds and text. They are made by `records.length_histogram` and summed by `records.add_counts`.
"""

from __future__ import annotations

from collections.abc import Mapping

_BAR_WIDTH = 40


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 chunk", "2,000 chunks"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def buckets(histogram: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) of each bucket, ascending, with the empty ones in between."""
    counts = {int(name.removeprefix("2^")): count for name, count in histogram.items()}
    if not counts:
        return []
    return [(2**k, 2 ** (k + 1) - 1, counts.get(k, 0)) for k in range(min(counts), max(counts) + 1)]


def quantile_bounds(histogram: Mapping[str, int], quantile: float) -> tuple[int, int]:
    """Between which lengths the given quantile (0 .. 1) lies; (0, 0) when there is no document.

    Example:
        >>> quantile_bounds({"2^3": 9, "2^10": 1}, 0.5)
        (8, 15)
    """
    rows = buckets(histogram)
    wanted = quantile * sum(count for _, _, count in rows)
    seen = 0
    for shortest, longest, count in rows:
        seen += count
        if count and seen >= wanted:
            return shortest, longest
    return 0, 0


def histogram_lines(histogram: Mapping[str, int]) -> list[str]:
    """One line per bucket: its lengths, a bar, its count."""
    rows = buckets(histogram)
    most = max((count for _, _, count in rows), default=0)
    names = [f"{shortest:,}" if shortest == longest else f"{shortest:,} - {longest:,}" for shortest, longest, _ in rows]
    width = max((len(name) for name in names), default=0)
    bars = ["#" * -(-count * _BAR_WIDTH // most) for _, _, count in rows]  # rounded up: one document is seen
    return [
        f"{name:>{width}}  {bar:<{_BAR_WIDTH}}  {count:,}"
        for name, bar, (_, _, count) in zip(names, bars, rows, strict=True)
    ]
