"""Documents' ids -> the tokens of a dataset: one boundary marker at the chosen end of each document.

Comes in: flat ids and offsets as an engine gives them. Goes out: flat tokens of the type on disk, markers in place.
Guarantee: no Python object per document; ids that text must never give are found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrainkit.metadata import Boundary, TokenizerInfo
from pretrainkit.tokenizers import EncodedDocuments

TokenArray = np.ndarray[Any, np.dtype[Any]]


class Boundaries:
    """Inserts the markers of one boundary rule.

    Args:
        boundary: Where markers stand.
        tokenizer: Their ids.
        dtype: Type of an id on disk.
        forbidden: Ids that no text may give (see `special_ids`).
    """

    def __init__(
        self, boundary: Boundary, tokenizer: TokenizerInfo, dtype: str, forbidden: tuple[int, ...] = ()
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._before = tokenizer.bos_id if boundary in ("bos", "both") else None
        self._after = tokenizer.eos_id if boundary in ("eos", "both") else None
        self.markers_per_document = 2 if boundary == "both" else 1
        self._is_forbidden = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_forbidden[list(forbidden)] = True
        # Special ids lie at the ends of a vocabulary: most batches are cleared by their smallest and largest id alone.
        edges = np.array([-1, *sorted(forbidden), tokenizer.vocab_size])
        widest = int(np.argmax(np.diff(edges)))
        self._first_free, self._last_free = int(edges[widest]) + 1, int(edges[widest + 1]) - 1

    def forged(self, encoded: EncodedDocuments) -> TokenArray:
        """Sorted indices of documents that hold an id which text must never give; nearly always empty."""
        ids = encoded.ids
        if not len(ids) or (ids.min() >= self._first_free and ids.max() <= self._last_free):
            return np.zeros(0, dtype=np.int64)
        positions = np.flatnonzero(self._is_forbidden[ids])
        return np.unique(np.searchsorted(encoded.offsets, positions, side="right") - 1)

    def insert(self, encoded: EncodedDocuments) -> tuple[TokenArray, TokenArray]:
        """Tokens of all documents with their markers, (tokens,) of the type on disk, and (documents,) int64 lengths."""
        lengths = np.diff(encoded.offsets) + self.markers_per_document
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=self._dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        if self._before is not None:
            is_text[ends - lengths] = False
            tokens[ends - lengths] = self._before
        if self._after is not None:
            is_text[ends - 1] = False
            tokens[ends - 1] = self._after
        tokens[is_text] = encoded.ids
        return tokens, lengths
