"""Engine `auto`: the fast engine where it is proven equal to the reference, the reference where it is not.

Comes in: a tokenizer folder and a sample of the user's own documents. Goes out: the name of an engine. Guarantee: the
choice depends on the tokenizer and the documents alone, so every machine makes the same; a difference that shows up
late is raised as `EngineDisprovedError`, and the caller does the work again with the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pretrainkit.arrow import string_array
from pretrainkit.errors import TokenizerError
from pretrainkit.tokenizers import ENGINES, EncodedDocuments, Engine
from pretrainkit.tokenizers.folder import split_added_tokens, tokenizer_file
from pretrainkit.tokenizers.torture import torture_texts

logger = logging.getLogger(__name__)

FAST_ENGINE = "gigatoken"


class EngineDisprovedError(TokenizerError):
    """The fast engine gave other ids than the reference for a document; `str` shows which."""


def reference_engine(tokenizer_dir: Path) -> Literal["tokenizers", "sentencepiece"]:
    """Name of the engine that defines the ids of this tokenizer."""
    kind, _ = tokenizer_file(tokenizer_dir)
    return "tokenizers" if kind == "json" else "sentencepiece"


def load_engine(name: str, tokenizer_dir: Path) -> Engine:
    """An engine by its registered name.

    Raises:
        ConfigError: No such engine.
        TokenizerError: The engine cannot read the tokenizer.
    """
    engine: Engine = ENGINES.get(name)(tokenizer_dir)
    return engine


def choose_engine(tokenizer_dir: Path, sample: Sequence[str]) -> str:
    """The engine that `auto` stands for: the fast one, unless it fails on the torture set or on the sample.

    Args:
        tokenizer_dir: Tokenizer folder.
        sample: Some of the user's own documents.
    """
    name = reference_engine(tokenizer_dir)
    reference = load_engine(name, tokenizer_dir)
    try:
        fast = load_engine(FAST_ENGINE, tokenizer_dir)
        texts = [*torture_texts(_special_tokens(tokenizer_dir)), *sample]
        check_equal(fast, reference, string_array(texts))
    except TokenizerError as error:
        logger.warning("engine auto: falling back from %s to %s, which is slower: %s", FAST_ENGINE, name, error)
        return name
    return FAST_ENGINE


def check_equal(fast: Engine, reference: Engine, documents: Any) -> None:
    """Compare two engines on an Arrow string array.

    Raises:
        EngineDisprovedError: They differ on a document.
    """
    got, expected = fast.encode(documents), reference.encode(documents)
    for index in range(len(documents)):
        compare_document(_slice(got, index), _slice(expected, index), documents[index].as_py(), fast.name)


def compare_document(got: Any, expected: Any, text: str, engine: str) -> None:
    """Compare two arrays of ids of one document.

    Raises:
        EngineDisprovedError: They differ; the message shows the place in the document.
    """
    import numpy as np

    if len(got) == len(expected) and bool((got == expected).all()):
        return
    shared = min(len(got), len(expected))
    different = np.flatnonzero(got[:shared] != expected[:shared])
    first = int(different[0]) if len(different) else shared
    shown = text if len(text) <= 200 else text[:200] + "..."
    raise EngineDisprovedError(
        f"{engine} gives other ids for the document {shown!r}: from token {first} on {got[first : first + 4].tolist()} "
        f"where the reference gives {expected[first : first + 4].tolist()}"
    )


def _slice(encoded: EncodedDocuments, index: int) -> Any:
    return encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]]


def _special_tokens(tokenizer_dir: Path) -> list[str]:
    kind, path = tokenizer_file(tokenizer_dir)
    if kind == "sentencepiece":
        return ["<s>", "</s>", "<unk>", "<pad>"]
    tokens = [token["content"] for token in split_added_tokens(path)[1]]
    # The first and the last: BOS and EOS stand at one of the ends, reserved ones fill the middle.
    return tokens if len(tokens) <= 48 else tokens[:24] + tokens[-24:]
