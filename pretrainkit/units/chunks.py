"""Token arrays of documents -> chunk files of bounded size, whole documents or whole blocks in each.

Comes in: flat ids with boundary markers and the documents' lengths, batch by batch. Goes out: `chunk-U-I.bin` files in
a staging folder and their records. Guarantee: the cuts depend on the documents and the settings alone, never on how the
documents were batched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pretrainkit.formats.litdata import chunk_header
from pretrainkit.records import ChunkRecord, SplitCounts, add_counts, chunk_name, length_histogram

TokenArray = np.ndarray[Any, np.dtype[Any]]


class ChunkWriter:
    """Writes one unit's documents of one split.

    Args:
        folder: Where to write; exists.
        unit: Number of the unit, for the names.
        split: "train" or "val", for the records.
        dtype: Type of an id.
        chunk_bytes: Size of tokens that a chunk does not exceed, unless one document does.
        block_size: Tokens per block; chunks but the unit's last hold whole blocks. None: whole documents.
    """

    def __init__(
        self, folder: Path, *, unit: int, split: str, dtype: str, chunk_bytes: int, block_size: int | None
    ) -> None:
        self._folder, self._unit, self._split = folder, unit, split
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
        self.chunks: list[ChunkRecord] = []

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
            self._write_full(self._limit)

    def finish(self) -> SplitCounts:
        """Write what is left and return the counts."""
        whole = self._num_tokens // self._block_size * self._block_size if self._block_size is not None else 0
        if 0 < whole < self._num_tokens:
            # What fills no block gets a chunk of its own: merge joins these small rests and links all the others.
            self._write_full(whole)
        if self._num_tokens:
            tokens, lengths = self._take_all()
            self._write(tokens, np.cumsum(lengths), ends_inside=False)
        return SplitCounts(
            documents=self._documents,
            tokens=self._all_tokens,
            text_bytes=self._text_bytes,
            document_lengths=add_counts(self._histograms),
        )

    def _take_all(self) -> tuple[TokenArray, TokenArray]:
        tokens = np.concatenate(self._tokens) if len(self._tokens) > 1 else self._tokens[0]
        lengths = np.concatenate(self._lengths) if len(self._lengths) > 1 else self._lengths[0]
        self._tokens, self._lengths, self._num_tokens = [], [], 0
        return tokens, lengths

    def _write_full(self, cut: int) -> None:
        """Write one chunk of `cut` tokens, or of the whole documents in them, and keep the rest."""
        tokens, lengths = self._take_all()
        ends = np.cumsum(lengths)
        if self._block_size is None:
            # As many whole documents as fit; one that is larger than a chunk gets a chunk of its own.
            items = max(1, int(np.searchsorted(ends, cut, side="right")))
            cut, rest = int(ends[items - 1]), lengths[items:]
            item_ends, ends_inside = ends[:items], False
        else:
            items = int(np.searchsorted(ends, cut, side="left"))
            item_ends = np.append(ends[:items], cut)
            rest = lengths[items:].copy()
            rest[0] = ends[items] - cut
            ends_inside = rest[0] > 0
            rest = rest if ends_inside else rest[1:]
        self._write(tokens[:cut], item_ends, ends_inside=bool(ends_inside))
        if cut < len(tokens):
            self._tokens, self._lengths, self._num_tokens = [tokens[cut:]], [rest], len(tokens) - cut

    def _write(self, tokens: TokenArray, item_ends: TokenArray, *, ends_inside: bool) -> None:
        import xxhash

        name = chunk_name(self._unit, len(self.chunks))
        header = chunk_header(item_ends, self._dtype.itemsize)
        body = np.ascontiguousarray(tokens).view(np.uint8).data
        digest = xxhash.xxh3_128(header)
        digest.update(body)
        with open(self._folder / name, "wb", buffering=0) as file:
            file.write(header)
            written = 0
            while written < len(body):  # a raw write may take less than it is given
                written += file.write(body[written:]) or 0
            os.fsync(file.fileno())
        self.chunks.append(
            ChunkRecord(
                filename=name,
                split=self._split,
                documents=len(item_ends) - self._begins_inside,
                items=len(item_ends),
                tokens=len(tokens),
                bytes=len(header) + len(body),
                checksum=digest.hexdigest(),
                max_token_id=int(tokens.max()),
            )
        )
        self._begins_inside = ends_inside
