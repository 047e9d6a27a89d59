"""Long documents, encoded piece by piece: memory is bounded by a piece, whatever the document.

Comes in: a document and a byte-level BPE that encodes bytes. Goes out: the ids of the whole. Guarantee: they are
those of the document encoded at once. BPE holds some twenty bytes per byte of a word, and text may be one word.

A piece ends in one of two ways. Before a space and a letter, where every pattern that splits text into words begins a
new one. Or, in a run of one kind of character, within a word, at the end of a token: a word's ids are the ones in which
every two neighbours, encoded by themselves, come back as they are. That holds in BPE because what happens within a
token's span happens there whatever lies around it, until the first merge across its end; and that merge would happen
between its two neighbours by themselves, too. So only the two tokens at the joint have to be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_WORD = re.compile(rb" [A-Za-z]")
# Runs in which every place is like every other to a pattern that splits text. Not digits: some patterns count them off.
_RUN = re.compile(rb"[a-z]+|[A-Z]+| +|=+|-+|_+|\*+|\.+|#+|~+")
_WINDOW_BYTES = 4096
# What a word's end does to the tokens before it is over after less than that.
_MARGIN_BYTES = 1024

_Ids = np.ndarray[Any, np.dtype[np.uint32]]
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def encode_in_pieces(
    document: _Bytes, encode: Callable[[_Bytes], _Ids], vocabulary: Callable[[], Mapping[int, bytes]], piece_bytes: int
) -> _Ids:
    """Ids of one document.

    Args:
        document: (bytes,) UTF-8.
        encode: Encodes bytes at once.
        vocabulary: Id -> the bytes it stands for; asked for only where a word is longer than a piece.
        piece_bytes: Length of a piece; a document that cannot be cut is encoded at once all the same.
    """
    ids = np.empty(document.size, dtype=np.uint32)  # memory is taken as it is filled
    filled, begin = 0, 0
    before = None  # the last token of the piece before, when the joint is within a word
    while begin < len(document):
        stop, within_word = _end_of_piece(document, begin, piece_bytes)
        piece = encode(document[begin:stop])
        if before is not None and not _are_neighbours(before, int(piece[0]), encode, vocabulary()):
            return encode(document)
        if within_word:
            piece, stop = _without_end(piece, stop, vocabulary())
        if filled + len(piece) > len(ids):  # normalised text may be longer than the document
            ids = np.concatenate([ids, np.empty_like(ids)])
        ids[filled : filled + len(piece)] = piece
        filled, begin = filled + len(piece), stop
        before = int(piece[-1]) if within_word else None
    return ids[:filled]


def _end_of_piece(document: _Bytes, begin: int, piece_bytes: int) -> tuple[int, bool]:
    """Where the piece that starts at `begin` is to end, and whether that is within a word."""
    if len(document) - begin > 2 * piece_bytes:
        window = document[begin + piece_bytes :][:_WINDOW_BYTES].tobytes()
        word = _WORD.search(window)
        if word is not None:
            return begin + piece_bytes + word.start(), False
        if _RUN.fullmatch(window) is not None:
            return begin + piece_bytes + len(window), True
    return len(document), False


def _without_end(ids: _Ids, stop: int, vocabulary: Mapping[int, bytes]) -> tuple[_Ids, int]:
    """A piece less the tokens at its end, which the cut within a word may have made; and where it ends then."""
    kept, end = len(ids), stop
    while stop - end < _MARGIN_BYTES:
        kept -= 1
        end -= len(vocabulary[int(ids[kept])])
    return ids[:kept], end


def _are_neighbours(left: int, right: int, encode: Callable[[_Bytes], _Ids], vocabulary: Mapping[int, bytes]) -> bool:
    """Whether two tokens stay as they are when they stand side by side in a word."""
    both = np.frombuffer(vocabulary[left] + vocabulary[right], np.uint8)
    return bool(encode(both).tolist() == [left, right])
