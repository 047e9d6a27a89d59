"""Where a run stands in its data: what was taken from each source, and since when the mixture is what it is.

Comes in: the opened sources with their weights, and the cursor of an earlier process. Goes out: plain numbers that a
checkpoint keeps. Guarantee: the next sample is the first one not taken yet, in all and from each source, whatever has
changed since: batch sizes, ranks, weights, sources that came or went. Samples are counted, never batches.

A mixture's pattern begins anew, at `since`, when its sources or weights change; each source goes on in its own order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrainkit.stream.order import Mixture
from pretrainkit.stream.source import BlockSource


@dataclass(frozen=True, kw_only=True)
class SourceCursor:
    """One source's part."""

    folder: str
    """Where it lies, for people: a dataset that was moved is still the same."""
    fingerprint: str
    """Of its index: what it is."""
    weight: float
    """Its share, as configured; 0 when it is not read any more."""
    order: int
    """What tells its order from other sources'; given once, whatever its place in the configuration."""
    samples: int = 0
    """Blocks taken from it before the present mixture began."""
    tokens: int = 0
    """Tokens in them."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A mixture, and what was taken before it began."""

    sources: tuple[SourceCursor, ...]
    """Those that are read, in the order of the configuration; then those that were."""
    block_size: int
    """Tokens trained per block."""
    since: int = 0
    """Samples taken before this mixture began."""

    @classmethod
    def begin(cls, sources: Sequence[BlockSource], weights: Sequence[float]) -> Cursor:
        """The beginning of a run."""
        return cls(sources=(), block_size=sources[0].block_tokens - 1).go_on(0, sources, weights)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cursor:
        """Take up `dataclasses.asdict` of a cursor."""
        return cls(**{**record, "sources": tuple(SourceCursor(**source) for source in record["sources"])})

    def go_on(self, samples: int, sources: Sequence[BlockSource], weights: Sequence[float]) -> Cursor:
        """The cursor of these sources after so many samples: this one where nothing has changed.

        Args:
            samples: Samples taken so far, in all.
            sources: What is read from now on, with one block size.
            weights: Their shares.
        """
        block_size = sources[0].block_tokens - 1
        left = self.after(samples)
        next_order = len(left)
        present = []
        for source, weight in zip(sources, weights, strict=True):
            same = [old for old in left if old.fingerprint == source.fingerprint]
            # A dataset may be there twice: then the one that lies where it lay, else the first.
            place = next((old for old in same if old.folder == source.folder), same[0] if same else None)
            if place is None:
                place = SourceCursor(
                    folder=source.folder, fingerprint=source.fingerprint, weight=weight, order=next_order
                )
                next_order += 1
            else:
                left.remove(place)
            present.append(dataclasses.replace(place, folder=source.folder, weight=weight))
        if block_size == self.block_size and _shares(present) == _shares(self.active):
            began = {old.order: old for old in self.sources}
            present = [dataclasses.replace(began[new.order], folder=new.folder, weight=new.weight) for new in present]
            return dataclasses.replace(self, sources=(*present, *left))
        gone = [dataclasses.replace(old, weight=0.0) for old in left]
        return Cursor(sources=(*present, *gone), block_size=block_size, since=samples)

    @property
    def active(self) -> tuple[SourceCursor, ...]:
        """The sources that are read."""
        return tuple(source for source in self.sources if source.weight)

    @property
    def mixture(self) -> Mixture:
        """Which source each sample comes from; numbers as this cursor's run counts them."""
        return Mixture(
            [source.weight for source in self.active],
            since=self.since,
            before=[source.samples for source in self.active],
        )

    def after(self, samples: int) -> list[SourceCursor]:
        """Every source with what was taken from it when `samples` samples were taken in all; exact."""
        if not self.active:
            return list(self.sources)
        counts = self.mixture.samples_per_source(samples)
        counted = [
            dataclasses.replace(
                source, samples=count, tokens=source.tokens + (count - source.samples) * self.block_size
            )
            for source, count in zip(self.active, counts, strict=True)
        ]  # fmt: skip
        return [*counted, *(source for source in self.sources if not source.weight)]


def differences(before: Cursor, after: Cursor) -> list[str]:
    """What is different in the data from `after.since` on, in words."""
    if before.since == after.since:
        return []
    lines = []
    was = {source.order: source for source in before.active}
    shares = [dict(_shares(cursor.active)) for cursor in (before, after)]
    for source in after.sources:
        count = f"{source.samples:,}"
        if not source.weight and source.order in was and source.folder not in {new.folder for new in after.active}:
            lines.append(f"{source.folder} is not read any more, after {count} blocks of it")
        elif source.weight and source.folder in {old.folder for old in was.values()} and source.order not in was:
            lines.append(f"{source.folder} holds other data; it is read from its beginning")
        elif source.weight and source.order not in was:
            lines.append(f"{source.folder} is read too, beginning after {count} blocks of it")
        elif source.weight and shares[0][source.order] != shares[1][source.order]:
            old, new = (f"{share[source.order]:.4g}" for share in shares)
            lines.append(f"{source.folder} has a share of {new} instead of {old}, going on after {count} blocks of it")
    if before.block_size != after.block_size:
        lines.append(
            f"blocks have {after.block_size:,} tokens instead of {before.block_size:,}; cut and ordered anew, what is "
            "left of this pass repeats some text and leaves out other"
        )
    return lines


def _shares(sources: Sequence[SourceCursor]) -> list[tuple[int, float]]:
    """What decides a mixture's pattern."""
    total = sum(source.weight for source in sources)
    return [(source.order, source.weight / total) for source in sources]
