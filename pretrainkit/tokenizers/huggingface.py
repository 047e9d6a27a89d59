"""Engine `tokenizers`: Hugging Face's own library, the reference that defines the ids of a tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pretrainkit.errors import TokenizerError
from pretrainkit.tokenizers import EncodedDocuments
from pretrainkit.tokenizers.folder import tokenizer_file


class HuggingFaceEngine:
    """Encodes with `tokenizers`; some 2 MB/s per core, because it makes Python objects for every token."""

    name = "tokenizers"

    def __init__(self, tokenizer_dir: Path) -> None:
        from tokenizers import Tokenizer

        kind, path = tokenizer_file(tokenizer_dir)
        if kind != "json":
            raise TokenizerError(f"{path} is no tokenizer.json; use engine=sentencepiece or engine=auto")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise TokenizerError(f"{path} cannot be loaded by tokenizers: {error}") from error
        # Text is text: without this, a document that says <|endoftext|> would forge a boundary.
        self._tokenizer.encode_special_tokens = True
        # A tokenizer.json may carry the truncation of the run that saved it; it would cut documents without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # With the dropout that a BPE may have been saved with, one text would give other ids each time.
        if hasattr(self._tokenizer.model, "dropout"):
            self._tokenizer.model.dropout = None

    def encode(self, documents: Any) -> EncodedDocuments:
        """See `Engine.encode`."""
        encodings = self._tokenizer.encode_batch_fast(documents.to_pylist(), add_special_tokens=False)
        offsets = np.zeros(len(encodings) + 1, dtype=np.int64)
        np.cumsum([len(encoding) for encoding in encodings], out=offsets[1:])
        ids = np.empty(offsets[-1], dtype=np.uint32)
        for index, encoding in enumerate(encodings):
            ids[offsets[index] : offsets[index + 1]] = encoding.ids
        return EncodedDocuments(ids, offsets)
