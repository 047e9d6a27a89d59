"""Engine `gigatoken`: Arrow buffers in, flat NumPy ids out, some fifty times as fast as the reference."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np

from pretrainkit.errors import TokenizerError
from pretrainkit.tokenizers import EncodedDocuments
from pretrainkit.tokenizers.folder import parse_tokenizer_json, tokenizer_file

# A worker has 1 GB in all, and the cache doubles when it grows. Real text fills it slowly, random words within 100 MB;
# the second bound is there because reloading more often would cost more than it gives.
_RELOAD_ABOVE_RESIDENT_BYTES = 448 << 20
_RELOAD_AFTER_TEXT_BYTES = 64 << 20


class GigatokenEngine:
    """Encodes with gigatoken on the calling thread: one worker process per CPU is the parallelism."""

    name = "gigatoken"

    def __init__(self, tokenizer_dir: Path) -> None:
        self._kind, self._path = tokenizer_file(tokenizer_dir)
        self._load()

    def _load(self) -> None:
        kind, path = self._kind, self._path
        self._bytes_since_load = 0
        self._backend: Any = None  # lets go of the old cache before the new tokenizer takes memory
        try:
            self._backend = _load_json(path) if kind == "json" else _load_sentencepiece(path)
        except ImportError as error:
            raise TokenizerError(f"gigatoken cannot be imported ({error}); use engine=tokenizers") from error
        except (ValueError, RuntimeError, TypeError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise TokenizerError(f"gigatoken does not support {path} ({reason}); use engine=tokenizers") from error

    def encode(self, documents: Any) -> EncodedDocuments:
        """See `Engine.encode`."""
        import awkward

        contents, index = awkward.contents, awkward.index
        offsets, characters = string_buffers(documents)
        strings = contents.ListOffsetArray(
            index.Index64(offsets),
            contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        self._bound_cache(characters.size)
        layout = self._backend.encode_batch(awkward.Array(strings), parallel=False).layout
        return EncodedDocuments(np.asarray(layout.content.data), np.asarray(layout.offsets.data))

    def _bound_cache(self, text_bytes: int) -> None:
        """Start with an empty cache when it has grown large: it keeps every distinct word for ever."""
        self._bytes_since_load += text_bytes
        if self._bytes_since_load > _RELOAD_AFTER_TEXT_BYTES and resident_bytes() > _RELOAD_ABOVE_RESIDENT_BYTES:
            self._load()


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    # Source: proc(5), statm: size, resident, ... in pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def string_buffers(documents: Any) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Offsets (documents + 1,) and characters of an Arrow string array; the characters are not copied."""
    import pyarrow as pa

    wide = pa.types.is_large_string(documents.type) or pa.types.is_large_binary(documents.type)
    _, offsets_buffer, data = documents.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64 if wide else np.int32)
    offsets = offsets[documents.offset : documents.offset + len(documents) + 1]
    if data is None:  # nothing but empty strings
        return np.zeros(len(documents) + 1, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    characters = np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]]
    return offsets.astype(np.int64) - int(offsets[0]), characters


def _load_json(path: Path) -> Any:
    return _load_without_special_tokens(parse_tokenizer_json(path.read_bytes(), path))


def _load_sentencepiece(path: Path) -> Any:
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    return _load_without_special_tokens(json.loads(sentencepiece_to_tokenizer_json(path.read_bytes())))


def _load_without_special_tokens(content: dict[str, Any]) -> Any:
    from gigatoken.gigatoken_rs import load_hf_json

    # Text is text: a token that is not registered cannot be found in a document.
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    return load_hf_json(json.dumps(content))
