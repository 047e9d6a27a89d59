"""The tokenizer's files, carried from a checkpoint into an export, and what the export must know about them."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrainkit.errors import ModelError, TokenizerError
from pretrainkit.storage import write_json

_log = logging.getLogger(__name__)

# Takes tokenizer.json as it lies. Other classes of transformers 5 build a pipeline of their own around the vocabulary:
# GPTNeoXTokenizer, Qwen2Tokenizer and LlamaTokenizer gave other ids than the same folder's tokenizer.json.
GENERIC_CLASS = "PreTrainedTokenizerFast"

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
_OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids that begin and end a text; None when the tokenizer has none."""

    bos_id: int | None = None
    """Begins a text."""
    eos_id: int | None = None
    """Ends a text."""


def find_tokenizer(checkpoint_folder: Path, tokenizer_dir: Path | None) -> Path | None:
    """Folder with the tokenizer: the given one, the checkpoint's own, or its `tokenizer/`; None when there is none.

    Raises:
        TokenizerError: The given folder holds no tokenizer.
    """
    if tokenizer_dir is not None:
        if not _has_tokenizer(tokenizer_dir):
            raise TokenizerError(f"--tokenizer_dir={tokenizer_dir} has no {' or '.join(VOCABULARY_FILES)}")
        return tokenizer_dir
    return next(filter(_has_tokenizer, (checkpoint_folder, checkpoint_folder / "tokenizer")), None)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def copy_tokenizer(source: Path | None, target: Path, padded_vocab_size: int) -> SpecialIds:
    """Copy the tokenizer's files and fill in what litgpt and transformers expect beside them.

    Args:
        source: Folder with the tokenizer; None copies nothing and says so.
        target: Folder to fill.
        padded_vocab_size: Rows of the model's embedding.

    Raises:
        TokenizerError: The files are damaged or name tokens that do not exist.
        ModelError: The tokenizer gives ids that the model has no embedding for.
    """
    if source is None:
        _log.warning("the checkpoint has no tokenizer, and so the result has none; say --tokenizer_dir DIR to add one")
        return SpecialIds()
    for name in (*VOCABULARY_FILES, *_OTHER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = _tokenizer_config(target)
    write_json(target / "tokenizer_config.json", config)
    size, ids = _read_vocabulary(target, config)
    if size > padded_vocab_size:
        raise ModelError(
            f"{source} gives ids up to {size - 1}, but the model has padded_vocab_size={padded_vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    return ids


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json with the keys that litgpt and transformers cannot do without."""
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    for key in ("bos_token", "eos_token"):
        if config.get(key) is None and special.get(key) is not None:
            config[key] = special[key]
    if not (folder / "tokenizer.json").is_file():
        return {"tokenizer_class": "LlamaTokenizer", **config}
    named = str(config.get("tokenizer_class", GENERIC_CLASS))
    if "LlamaTokenizer" not in named:
        return {**config, "tokenizer_class": GENERIC_CLASS}
    if _is_sentencepiece(folder / "tokenizer.json"):
        return config  # litgpt decodes these word by word, and knows them by this name
    # What litgpt would take from the name. Source: litgpt tokenizer.py check_if_bos_token_used.
    add_bos = config.get("add_bos_token", named == "LlamaTokenizer")
    return {**config, "tokenizer_class": GENERIC_CLASS, "add_bos_token": add_bos}


def _is_sentencepiece(path: Path) -> bool:
    model = _read_json(path).get("model")
    return isinstance(model, dict) and bool(model.get("byte_fallback"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no settings")
    return content


def _read_vocabulary(folder: Path, config: dict[str, Any]) -> tuple[int, SpecialIds]:
    """Largest id + 1, and the ids of the special tokens."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise TokenizerError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error})") from error
        found = {key: tokenizer.token_to_id(text) for key, text in _special_texts(config).items()}
        for key, identifier in found.items():
            if identifier is None:
                raise TokenizerError(f"tokenizer_config.json: {key}={config[key]!r} is not a token; correct the file")
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        return size, SpecialIds(bos_id=found.get("bos_token"), eos_id=found.get("eos_token"))
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    bos_id, eos_id = (
        identifier if identifier >= 0 else None for identifier in (processor.bos_id(), processor.eos_id())
    )
    return processor.vocab_size(), SpecialIds(bos_id=bos_id, eos_id=eos_id)


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and eos_token as text; both may be written as an object with its content."""
    texts = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            texts[key] = str(token)
    return texts


def generation_config(ids: SpecialIds) -> dict[str, Any]:
    """What `generation_config.json` holds: where texts begin and end."""
    named = {"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id}
    return {name: identifier for name, identifier in named.items() if identifier is not None}


def tell_transformers(folder: Path, block_size: int) -> None:
    """Make transformers take tokenizer.json as it lies, and know the model's context length.

    A tokenizer.model alone goes through transformers' own reading of SentencePiece, which is not exact for every model:
    where it gives other ids, that is said.
    """
    path = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file():
        write_json(path, {**_read_json(path), "tokenizer_class": GENERIC_CLASS, "model_max_length": block_size})
    elif (folder / "tokenizer.model").is_file():
        write_json(path, {**_read_json(path), "model_max_length": block_size})
        if different := _texts_read_differently(folder):
            _log.warning(
                "transformers reads tokenizer.model its own way: other ids than sentencepiece for %s; "
                "put an exact tokenizer.json beside it, or encode with sentencepiece",
                ", ".join(map(repr, different)),
            )


_PROBES = ("The quick brown fox.", "two  spaces", " leading", "trailing ", "line\nline", "ﬁ ½ Å", "数字 1234 é 👩‍👧")


def _texts_read_differently(folder: Path) -> list[str]:
    """Texts for which transformers and sentencepiece give different ids."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    exported = AutoTokenizer.from_pretrained(folder)
    return [text for text in _PROBES if exported(text, add_special_tokens=False)["input_ids"] != reference.encode(text)]
