"""Text -> token ids: one small interface, one file per engine.

Comes in: an Arrow array of strings. Goes out: one flat NumPy array of ids and one of document ends; no Python object
per token, and none per document where the engine allows it. Guarantee: the ids are those of Hugging Face `tokenizers`
(of `sentencepiece` for a tokenizer.model) for the text alone: nothing is added, cut or padded, and a special token's
name inside a document is text, never its id.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pretrainkit.registry import Registry

if TYPE_CHECKING:
    import numpy as np

AUTO = "auto"

ENGINES = Registry(
    "tokenizer engine",
    {
        "gigatoken": "pretrainkit.tokenizers.gigatoken:GigatokenEngine",
        "tokenizers": "pretrainkit.tokenizers.huggingface:HuggingFaceEngine",
        "sentencepiece": "pretrainkit.tokenizers.sentencepiece:SentencePieceEngine",
    },
)


class EncodedDocuments(NamedTuple):
    """The ids of several documents, one after another."""

    ids: np.ndarray[Any, np.dtype[np.uint32]]
    """(tokens,) ids."""
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    """(documents + 1,) where each document begins in `ids`; the last is the end of the last one."""


class Engine(Protocol):
    """What encodes; made once per worker from a tokenizer folder."""

    name: str
    """Its name in ENGINES."""

    def __init__(self, tokenizer_dir: Path) -> None:
        """Load the tokenizer.

        Raises:
            TokenizerError: This engine cannot read it.
        """

    def encode(self, documents: Any) -> EncodedDocuments:
        """Encode a `pyarrow.StringArray` or `LargeStringArray` of valid UTF-8 without nulls."""
