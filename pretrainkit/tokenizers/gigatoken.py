"""Engine `gigatoken`: Arrow buffers in, flat NumPy ids out, some fifty times as fast as the reference."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pretrainkit.arrow import string_buffers
from pretrainkit.errors import TokenizerError
from pretrainkit.memory import resident_bytes, return_free_memory
from pretrainkit.tokenizers import EncodedDocuments
from pretrainkit.tokenizers.folder import split_added_tokens, tokenizer_file
from pretrainkit.tokenizers.pieces import encode_in_pieces

# The engine keeps every distinct word for ever: entries of 32 bytes in a table that doubles when it is 3/4 full, the
# old and the new one side by side for a moment, and longer words apart. A worker has 1 GB in all, so a table of 2^23
# entries (268 MB, 134 MB more while it grows) is the last. Real text comes there after gigabytes, random words after
# 25 MB. Source: gigatoken's src/bpe/pretoken_cache.rs, and resident memory measured on random words.
_LARGEST_TABLE_GROWTH_BYTES = 100 << 20
# What else grows (long words, the batches and chunks of this process) has this much room since the engine was loaded.
_RELOAD_AFTER_GROWTH_BYTES = 448 << 20
# Loading takes half a second: not more often than this.
_RELOAD_AFTER_TEXT_BYTES = 64 << 20
# What is longer is cut into pieces, whose words' halves then fit into the processor's cache.
_LONG_DOCUMENT_BYTES = 4 << 20
_PIECE_BYTES = 1 << 18

_Ids = np.ndarray[Any, np.dtype[np.uint32]]
_Characters = np.ndarray[Any, np.dtype[np.uint8]]
_Lengths = np.ndarray[Any, np.dtype[np.int64]]


class _Documents(NamedTuple):
    """What `encode_batch` reads without a Python object per document."""

    characters: _Characters
    """(bytes,) UTF-8 of all documents, one after another."""
    lengths: _Lengths
    """(documents,) bytes of each."""


def _buffers_as_awkward() -> ModuleType:
    """A module that answers gigatoken's questions to `awkward` with the buffers themselves.

    gigatoken takes documents as an `awkward.Array`, asks awkward for its flat buffers, and has awkward make an array
    of the ids. Both ways awkward builds layouts in Python, 2 ms per batch of 30, and takes 0.2 s to be imported, to
    hand through two arrays that we have. Source: gigatoken 0.10.0, src/bindings/bridge.rs, `extract_awkward_docs` and
    `ragged_to_python`.
    """
    module = ModuleType("awkward")
    functions = {
        "Array": _Documents,
        "without_parameters": lambda documents: documents,
        "flatten": lambda documents: documents.characters,
        "num": lambda documents: documents.lengths,
        "to_numpy": lambda array: array,
        "unflatten": lambda ids, lengths: (ids, lengths),
    }
    vars(module).update(functions)
    return module


_BUFFERS = _buffers_as_awkward()


@contextlib.contextmanager
def _instead_of_awkward() -> Iterator[None]:
    """Let `import awkward` find that module, for gigatoken alone: within this block nothing else is imported."""
    real = sys.modules.get("awkward")
    sys.modules["awkward"] = _BUFFERS
    try:
        yield
    finally:
        if real is None:
            del sys.modules["awkward"]
        else:
            sys.modules["awkward"] = real


class GigatokenEngine:
    """Encodes with gigatoken on the calling thread: one worker process per CPU is the parallelism."""

    name = "gigatoken"

    def __init__(self, tokenizer_dir: Path) -> None:
        kind, self._path = tokenizer_file(tokenizer_dir)
        try:
            self._definition, self._has_added = _definition(self._path) if kind == "json" else _converted(self._path)
        except ImportError as error:
            raise TokenizerError(f"gigatoken cannot be imported ({error}); use engine=tokenizers") from error
        except (ValueError, TypeError, KeyError) as error:
            raise self._unsupported(error) from error
        self._load()

    def _load(self) -> None:
        self._backend: Any = None  # lets go of the old cache before the new tokenizer takes memory
        try:
            from gigatoken.gigatoken_rs import BPETokenizer, load_hf_json

            self._backend = load_hf_json(self._definition)
        except ImportError as error:
            raise TokenizerError(f"gigatoken cannot be imported ({error}); use engine=tokenizers") from error
        except (ValueError, RuntimeError, TypeError, KeyError, NotImplementedError) as error:
            raise self._unsupported(error) from error
        return_free_memory()
        self._text_since_load = 0
        self._resident_at_load = resident_bytes()
        self._table_is_large = False
        # An added token may lie across any place, and other models do not begin with words.
        self._can_cut = isinstance(self._backend, BPETokenizer) and not self._has_added

    def _unsupported(self, error: Exception) -> TokenizerError:
        reason = " ".join(str(error).split())
        other = "tokenizers" if self._path.suffix == ".json" else "sentencepiece"
        return TokenizerError(f"gigatoken does not support {self._path} ({reason}); use engine={other}")

    def encode(self, documents: Any) -> EncodedDocuments:
        """See `Engine.encode`."""
        offsets, characters = string_buffers(documents)
        lengths = np.diff(offsets)
        is_long = (lengths > _LONG_DOCUMENT_BYTES) & self._can_cut
        if not is_long.any():
            return _with_offsets(*self._encode(_Documents(characters, lengths)))
        edges = sorted({0, len(lengths), *np.flatnonzero(is_long), *(np.flatnonzero(is_long) + 1)})
        encoded = []
        for first, last in itertools.pairwise(edges):  # a long document, or as many others as follow each other
            part = _Documents(characters[offsets[first] : offsets[last]], lengths[first:last])
            encoded.append(self._encode_long(part) if is_long[first] else self._encode(part))
        if len(encoded) == 1:  # one document, whose ids need no second copy
            return _with_offsets(*encoded[0])
        return _with_offsets(*map(np.concatenate, zip(*encoded, strict=True)))

    def _encode_long(self, document: _Documents) -> tuple[_Ids, _Lengths]:
        """`_encode` of one document that is cut into pieces."""

        def encode_piece(characters: _Characters) -> _Ids:
            return self._encode(_Documents(characters, np.array([characters.size])))[0]

        ids = encode_in_pieces(document.characters, encode_piece, lambda: self._vocabulary, _PIECE_BYTES)
        return ids, np.array([len(ids)])

    def _encode(self, documents: _Documents) -> tuple[_Ids, _Lengths]:
        """Ids of documents one after another, and how many each has."""
        resident = self._bound_cache(documents.characters.size)
        with _instead_of_awkward():
            ids, counts = self._backend.encode_batch(documents, parallel=False)
        growth = resident_bytes() - resident - ids.nbytes
        self._table_is_large |= growth > _LARGEST_TABLE_GROWTH_BYTES
        return ids, counts

    @functools.cached_property
    def _vocabulary(self) -> dict[int, bytes]:
        return dict(self._backend.vocab)

    def _bound_cache(self, text_bytes: int) -> int:
        """Start with an empty cache when it has grown large; resident memory of this process, bytes."""
        resident = resident_bytes()
        grown = resident - self._resident_at_load
        is_due = self._text_since_load > _RELOAD_AFTER_TEXT_BYTES
        if self._table_is_large or (is_due and grown > _RELOAD_AFTER_GROWTH_BYTES):
            self._load()
            resident = self._resident_at_load
        self._text_since_load += text_bytes
        return resident


def _with_offsets(ids: _Ids, counts: _Lengths) -> EncodedDocuments:
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return EncodedDocuments(ids, offsets)


def _definition(path: Path) -> tuple[str, bool]:
    """What gigatoken is to load, and whether it has tokens that are looked for in the text before it is split."""
    before, added, after = split_added_tokens(path)
    # Text is text: a token that is not registered cannot be found in a document.
    registered = [token for token in added if not token.get("special")]
    for token in registered:
        if token.get("single_word"):
            raise ValueError(f"the added token {token['content']!r} is single_word, which it would find within words")
    return before + json.dumps(registered) + after, bool(registered)


def _converted(path: Path) -> tuple[str, bool]:
    """The same for a tokenizer.model."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = json.loads(sentencepiece_to_tokenizer_json(path.read_bytes()))
    registered = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    return json.dumps({**content, "added_tokens": registered}), bool(registered)
