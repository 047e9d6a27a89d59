"""Engine `sentencepiece`: Google's own library, the reference that defines the ids of a tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pretrainkit.errors import TokenizerError
from pretrainkit.tokenizers import EncodedDocuments
from pretrainkit.tokenizers.folder import tokenizer_file


class SentencePieceEngine:
    """Encodes with `sentencepiece`, which never gives a control symbol's id for text."""

    name = "sentencepiece"

    def __init__(self, tokenizer_dir: Path) -> None:
        kind, path = tokenizer_file(tokenizer_dir)
        if kind != "sentencepiece":
            raise TokenizerError(f"{path} is no tokenizer.model; use engine=tokenizers or engine=auto")
        self._model = load_model(path)

    def encode(self, documents: Any) -> EncodedDocuments:
        """See `Engine.encode`."""
        encoded = self._model.encode(documents.to_pylist(), out_type=int, num_threads=1)
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        flat = np.empty(offsets[-1], dtype=np.uint32)
        for index, ids in enumerate(encoded):
            flat[offsets[index] : offsets[index + 1]] = ids
        return EncodedDocuments(flat, offsets)


def load_model(path: Path) -> Any:
    """A `SentencePieceProcessor` of a tokenizer.model.

    Raises:
        TokenizerError: The library is missing or the file is damaged.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise TokenizerError(f"{path} needs sentencepiece: pip install 'pretrainkit[sentencepiece]'") from error
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, TypeError) as error:
        raise TokenizerError(f"{path} is no SentencePiece model: {' '.join(str(error).split())}") from error


def user_defined_symbols(path: Path) -> list[str]:
    """What a tokenizer.model takes for one piece wherever it stands in a text; a few other pieces may be among them."""
    model = load_model(path)
    numbers = list(range(model.get_piece_size()))
    # The library does not tell which they are, but they have no score; nor have control symbols, bytes, and one merge.
    unscored = [number for number, score in zip(numbers, model.get_score(numbers), strict=True) if score == 0]
    kinds = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
    chosen = [number for number in unscored if not any(is_kind(number) for is_kind in kinds)]
    return [piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for piece in model.id_to_piece(chosen)]
