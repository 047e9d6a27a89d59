"""Token arrays of documents -> chunk files of bounded size, whole documents or whole blocks in each.

Comes in: flat ids with boundary markers and the documents' lengths, batch by batch. Goes out: files in a stage, written
by another thread while more is being encoded, and their records. Guarantee: the cuts depend on the documents and the
settings alone, never on how the documents were batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from pretrainkit.direct import DirectWriter
from pretrainkit.formats.litdata import chunk_header
from pretrainkit.records import ChunkRecord, SplitCounts, add_counts, chunk_name, length_histogram
from pretrainkit.units.stage import Stage

TokenArray = np.ndarray[Any, np.dtype[Any]]


class ChunkWriter:
    """Writes one unit's documents of one split.

    Args:
        stage: Where to write.
        files: What writes.
        thread: Where it writes: one thread, which does one thing after another.
        unit: Number of the unit, for the names.
        split: "train" or "val", for the records.
        dtype: Type of an id.
        chunk_bytes: Size of tokens that a chunk does not exceed, unless one document does.
        block_size: Tokens per block; chunks but the unit's last hold whole blocks. None: whole documents.
    """

    def __init__(
        self,
        stage: Stage,
        files: DirectWriter,
        thread: Executor,
        *,
        unit: int,
        split: str,
        dtype: str,
        chunk_bytes: int,
        block_size: int | None,
    ) -> None:
        self._stage, self._files, self._thread = stage, files, thread
        self._unit, self._split = unit, split
        self._dtype = np.dtype(dtype)
        self._limit = chunk_bytes // self._dtype.itemsize
        self._block_size = block_size
        if block_size is not None:
            self._limit -= self._limit % block_size
        self._tokens: list[TokenArray] = []
        self._lengths: list[TokenArray] = []
        self._num_tokens = 0
        self._begins_inside = False  # whether the first item continues a document of the chunk before
        self._histograms: list[dict[str, int]] = []
        self._documents = self._all_tokens = self._text_bytes = 0
        self._written: list[Future[ChunkRecord]] = []

    def add(self, tokens: TokenArray, lengths: TokenArray, text_bytes: int) -> None:
        """Take documents.

        Args:
            tokens: (tokens,) ids of all documents, markers included, of the writer's type.
            lengths: (documents,) int64 tokens of each, all > 0.
            text_bytes: UTF-8 bytes of their text.
        """
        if not len(lengths):
            return
        self._histograms.append(length_histogram(lengths))
        self._documents += len(lengths)
        self._all_tokens += len(tokens)
        self._text_bytes += text_bytes
        self._tokens.append(tokens)
        self._lengths.append(lengths)
        self._num_tokens += len(tokens)
        while self._num_tokens > self._limit:
            self._cut_off(self._limit)

    def close(self) -> None:
        """Have written what is left; nothing can be added afterwards."""
        whole = self._num_tokens // self._block_size * self._block_size if self._block_size is not None else 0
        if 0 < whole < self._num_tokens:
            # What fills no block gets a chunk of its own: merge joins these small rests and links all the others.
            self._cut_off(whole)
        if self._num_tokens:
            self._cut_off(self._num_tokens)

    def counts(self) -> SplitCounts:
        """What was taken in all."""
        return SplitCounts(
            documents=self._documents,
            tokens=self._all_tokens,
            text_bytes=self._text_bytes,
            document_lengths=add_counts(self._histograms),
        )

    def chunks(self) -> tuple[ChunkRecord, ...]:
        """Records of the chunks in order, once all of them are written.

        Raises:
            OSError: One could not be written.
        """
        return tuple(record.result() for record in self._written)

    def _cut_off(self, cut: int) -> None:
        """Have one chunk of the first `cut` tokens written, or of the whole documents in them, and keep the rest."""
        lengths = np.concatenate(self._lengths)
        ends = np.cumsum(lengths)
        ends_inside = False
        if self._block_size is None:
            # As many whole documents as fit; one that is larger than a chunk gets a chunk of its own.
            items = max(1, int(np.searchsorted(ends, cut, side="right")))
            cut, rest = int(ends[items - 1]), lengths[items:]
            item_ends = ends[:items]
        else:
            items = int(np.searchsorted(ends, cut, side="left"))
            item_ends = np.append(ends[:items], cut)
            rest = lengths[items:].copy()
            rest[0] = ends[items] - cut
            ends_inside = bool(rest[0] > 0)
            rest = rest if ends_inside else rest[1:]
        parts, self._tokens = _divide(self._tokens, cut)
        self._lengths, self._num_tokens = [rest], self._num_tokens - cut
        if self._written:
            self._written[-1].result()  # no more than two chunks are held in memory
        name, documents = chunk_name(self._unit, len(self._written)), len(item_ends) - self._begins_inside
        self._written.append(self._thread.submit(self._write, name, parts, item_ends, documents))
        self._begins_inside = ends_inside

    def _write(self, name: str, parts: list[TokenArray], item_ends: TokenArray, documents: int) -> ChunkRecord:
        import xxhash

        header = chunk_header(item_ends, self._dtype.itemsize)
        digest = xxhash.xxh3_128()
        size = self._files.write(staged_chunk(self._stage, self._split, name), [header, *parts], digest.update)
        return ChunkRecord(
            filename=name,
            split=self._split,
            documents=documents,
            items=len(item_ends),
            tokens=int(item_ends[-1]),
            bytes=size,
            checksum=digest.hexdigest(),
            max_token_id=max(int(part.max()) for part in parts),
        )


def staged_chunk(stage: Stage, split: str, name: str) -> str:
    """Where a chunk lies until it is published: chunks of all splits have the same names."""
    return f"{stage.path}/{split}-{name}"


def _divide(parts: Sequence[TokenArray], count: int) -> tuple[list[TokenArray], list[TokenArray]]:
    """The first `count` elements of arrays that follow each other, and the others; views of both, none empty."""
    first: list[TokenArray] = []
    for index, part in enumerate(parts):
        if count < len(part):
            return [*first, *([part[:count]] if count else [])], [part[count:], *parts[index + 1 :]]
        first.append(part)
        count -= len(part)
    return first, []
