"""Engine `auto`: the fast engine where it is proven equal to the reference, the reference where it is not.

Comes in: a tokenizer folder and a sample of the user's own documents. Goes out: the name of an engine. Guarantee: the
choice depends on the tokenizer and the documents alone, so every machine makes the same; a difference that shows up
late is raised as `EngineDisprovedError`, and the caller does the work again with the reference.
"""

from __future__ import annotations

import logging
from collections import Counter
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
# Five short texts each: a tenth of a second for the reference.
_MOST_TOKENS_TRIED = 512


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
        texts = [*torture_texts(_telling_tokens(tokenizer_dir)), *sample]
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


def _telling_tokens(tokenizer_dir: Path) -> list[str]:
    """Added tokens whose names in a text may mislead an engine."""
    kind, path = tokenizer_file(tokenizer_dir)
    if kind == "sentencepiece":
        from pretrainkit.tokenizers.sentencepiece import user_defined_symbols

        return ["<s>", "</s>", "<unk>", "<pad>", *user_defined_symbols(path)[:_MOST_TOKENS_TRIED]]
    added = split_added_tokens(path)[1]
    # Those that are not special are found in text, by rules of their own; the rarer their rules, the sooner tried.
    found = [token for token in added if not token.get("special")]
    rules = Counter(map(_rules, found))
    found.sort(key=lambda token: rules[_rules(token)])
    names = [token["content"] for token in found[:_MOST_TOKENS_TRIED]]
    # Of special ones the first and the last: BOS and EOS stand at one of the ends, reserved ones fill the middle.
    special = [token["content"] for token in added if token.get("special")]
    return names + (special if len(special) <= 48 else special[:24] + special[-24:])


def _rules(token: dict[str, Any]) -> tuple[bool, ...]:
    """How a token is looked for."""
    return tuple(bool(token.get(rule)) for rule in ("lstrip", "rstrip", "single_word", "normalized"))
