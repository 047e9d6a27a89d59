"""Which source chunks become which chunks of the merged dataset: a pure function of token counts.

Comes in: the token counts of all source chunks in order. Goes out: one `Output` per merged chunk, made of parts of
source chunks. Guarantee: it depends on nothing but its arguments, so the merged bytes are the same wherever the
sources lay; every token is in exactly one output or in the tail, and the tail is shorter than one block.

A chunk that is large, and aligned where a block size is given, is taken as it lies and costs a link. Small ones, such
as the validation splits of single units, are joined with their neighbours. With a block size, what stands at the end
of a unit and fills no whole block is carried over into a joined chunk: left alone, it would be out of reach for a
reader that takes whole blocks from each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A chunk below this share of the wanted size counts as small.
_SMALL = 8


@dataclass(frozen=True)
class Part:
    """A run of tokens of one source chunk."""

    chunk: int
    """Index of the source chunk."""
    start: int
    """First token."""
    stop: int
    """One past the last token."""

    @property
    def tokens(self) -> int:
        """Length of the run."""
        return self.stop - self.start


@dataclass(frozen=True)
class Output:
    """One chunk of the merged dataset."""

    filename: str
    """Name in the target folder."""
    parts: tuple[Part, ...]
    """What it is made of, in order."""
    whole: bool
    """Whether it is exactly one source chunk, byte for byte."""


def lay_out(
    tokens: Sequence[int], *, itemsize: int, block_size: int | None, chunk_bytes: int
) -> tuple[list[Output], list[Part]]:
    """Plan the merged chunks.

    Args:
        tokens: Tokens of each source chunk, in the order of the dataset.
        itemsize: Bytes per token.
        block_size: Merged chunks' token counts are multiples of it; None for whole source chunks.
        chunk_bytes: Size to which small chunks are joined.

    Returns:
        The outputs in order, and the parts that fill no whole block at the very end (always empty without block_size).
    """
    block = block_size or 1
    wanted = max(block, chunk_bytes // itemsize // block * block)  # tokens of a joined chunk
    outputs: list[Output] = []
    pending: list[Part] = []
    held = 0  # tokens in `pending`

    def emit(parts: list[Part]) -> None:
        whole = len(parts) == 1 and parts[0].tokens == tokens[parts[0].chunk]
        outputs.append(Output(f"chunk-0-{len(outputs)}.bin", tuple(parts), whole))

    for index, count in enumerate(tokens):
        large = count % block == 0 and count * itemsize >= chunk_bytes // _SMALL
        if block_size is None and pending and (large or held + count > wanted):
            emit(pending)  # nothing is carried over here, so the order stays exact
            pending, held = [], 0
        if large:
            emit([Part(index, 0, count)])
            continue
        pending.append(Part(index, 0, count))
        held += count
        while block_size is not None and held >= wanted:
            joined, pending = _split(pending, wanted)
            held -= wanted
            emit(joined)
    joined, tail = _split(pending, held // block * block)
    if joined:
        emit(joined)
    return outputs, tail


def _split(parts: list[Part], count: int) -> tuple[list[Part], list[Part]]:
    """The first `count` tokens of the parts, and the rest."""
    first: list[Part] = []
    rest: list[Part] = []
    for part in parts:
        cut = min(part.start + count, part.stop)
        if cut > part.start:
            first.append(Part(part.chunk, part.start, cut))
        if cut < part.stop:
            rest.append(Part(part.chunk, cut, part.stop))
        count -= cut - part.start
    return first, rest
