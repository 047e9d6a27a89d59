"""What a tokenizer folder holds: `tokenizer.json` or `tokenizer.model`, and the ids of BOS and EOS.

Comes in: a folder as Hugging Face or Meta lay it out. Goes out: `TokenizerInfo`, read from the JSON files, without
loading a tokenizer library. Guarantee: the hash covers the bytes that define the ids, and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pretrainkit.errors import ConfigError, TokenizerError
from pretrainkit.metadata import Boundary, TokenDtype, TokenizerInfo
from pretrainkit.storage import write_atomic

TokenizerKind = Literal["json", "sentencepiece"]

MODEL_CONFIG_JSON = "config.json"  # a model's, read for the ids of BOS and EOS where nothing else names them

# What is copied beside a dataset: enough for litgpt, transformers and us to load the tokenizer again.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    MODEL_CONFIG_JSON,
)
_LARGEST_UINT16_VOCABULARY = 1 << 16
# In JSON a quote inside a string is escaped, so this is a key and its list.
_ADDED_TOKENS = re.compile(r'(?<!\\)"added_tokens"\s*:\s*(?=\[)')


def tokenizer_file(folder: Path) -> tuple[TokenizerKind, Path]:
    """The file that defines the ids; tokenizer.json wins over tokenizer.model, as in transformers and litgpt.

    Raises:
        TokenizerError: The folder is missing or holds neither.
    """
    if not folder.is_dir():
        hint = f"; give its folder, {folder.parent}" if folder.is_file() else ""
        raise TokenizerError(f"tokenizer_dir={folder} is not a folder{hint}")
    kinds: tuple[tuple[TokenizerKind, str], ...] = (("json", "tokenizer.json"), ("sentencepiece", "tokenizer.model"))
    for kind, name in kinds:
        if (folder / name).is_file():
            return kind, folder / name
    raise TokenizerError(
        f"tokenizer_dir={folder} has no tokenizer.json and no tokenizer.model; give a tokenizer's folder"
    )


def read_tokenizer(folder: Path) -> TokenizerInfo:
    """What a folder's tokenizer is.

    Raises:
        TokenizerError: The folder holds no tokenizer, or a damaged one.
    """
    kind, path = tokenizer_file(folder)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    name = folder.resolve().name
    if kind == "sentencepiece":
        return _read_sentencepiece(folder, path, sha256)
    content = parse_tokenizer_json(path)
    try:
        ids = token_ids(content)
        if not all(type(number) is int and number >= 0 for number in ids.values()):
            raise ValueError("an id is no number")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{path} has a damaged vocabulary ({error}); fetch the tokenizer again") from error
    if not ids:
        raise TokenizerError(f"{path} has no vocabulary; give a whole tokenizer")
    bos, eos = (_marker_id(folder, marker, ids) for marker in ("bos", "eos"))
    return TokenizerInfo(name=name, sha256=sha256, vocab_size=max(ids.values()) + 1, bos_id=bos, eos_id=eos)


def _read_sentencepiece(folder: Path, path: Path, sha256: str) -> TokenizerInfo:
    from pretrainkit.tokenizers.sentencepiece import load_model

    model = load_model(path)
    bos, eos = (int(i) if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
    size = int(model.get_piece_size())
    return TokenizerInfo(name=folder.resolve().name, sha256=sha256, vocab_size=size, bos_id=bos, eos_id=eos)


def parse_tokenizer_json(path: Path) -> dict[str, Any]:
    """The mapping in tokenizer.json; shared, so leave it as it is.

    Raises:
        TokenizerError: Not JSON, or not a tokenizer.
    """
    status = path.stat()
    return _parse_version(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=1)  # a vocabulary of 128,000 takes a third of a second
def _parse_version(path: Path, _version: tuple[int, ...]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({error}); fetch the tokenizer again") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise TokenizerError(f"{path} is not a tokenizer of Hugging Face tokenizers: it has no `model`")
    return content


def split_added_tokens(path: Path) -> tuple[str, list[dict[str, Any]], str]:
    """tokenizer.json before its `added_tokens`, these tokens, and the file after them.

    The vocabulary, which is nearly all of the file and comes last, is not parsed.

    Raises:
        TokenizerError: Not JSON, or not a tokenizer.
    """
    text = path.read_text(encoding="utf-8")
    found = _ADDED_TOKENS.search(text)
    if found is not None:
        try:
            # With the rest left out, what comes before the key is an object by itself: the key stands on the top level.
            json.loads(text[: found.start()].rstrip().removesuffix(",") + "}")
            tokens, end = json.JSONDecoder().raw_decode(text, found.end())
            return text[: found.end()], tokens, text[end:]
        except ValueError:
            pass
    content = dict(parse_tokenizer_json(path))
    tokens = content.pop("added_tokens", None) or []
    return '{"added_tokens": ', tokens, ", " + json.dumps(content)[1:]


def token_ids(content: dict[str, Any]) -> dict[str, int]:
    """Token -> id, of the model's vocabulary and the added tokens."""
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...] in id order
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}


def special_ids(folder: Path, info: TokenizerInfo) -> tuple[int, ...]:
    """Ids that text must never give: every special token's but the unknown token's, which text may give by design."""
    kind, path = tokenizer_file(folder)
    found = {marker for marker in (info.bos_id, info.eos_id) if marker is not None}
    if kind == "sentencepiece":
        from pretrainkit.tokenizers.sentencepiece import load_model

        model = load_model(path)
        return tuple(sorted(found | {i for i in range(info.vocab_size) if model.is_control(i)}))
    content = parse_tokenizer_json(path)
    unknown = content["model"].get("unk_token")
    if unknown is None and isinstance(content["model"].get("unk_id"), int):  # Unigram names the id
        unknown = next((t for t, i in token_ids(content).items() if i == content["model"]["unk_id"]), None)
    added = content.get("added_tokens") or []
    return tuple(sorted(found | {t["id"] for t in added if t.get("special") and t["content"] != unknown}))


def _marker_id(folder: Path, marker: Literal["bos", "eos"], ids: dict[str, int]) -> int | None:
    """Id of BOS or EOS: named in the tokenizer's configuration, else numbered in a model's."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / name).get(f"{marker}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if not isinstance(token, str) or token not in ids:
                raise TokenizerError(f"{folder / name}: {marker}_token {token!r} is not in the vocabulary")
            return ids[token]
    for name in ("generation_config.json", "config.json"):
        number = _read_json(folder / name).get(f"{marker}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            if number not in ids.values():
                raise TokenizerError(f"{folder / name}: {marker}_token_id {number} is not in the vocabulary")
            return number
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({error}); fetch the tokenizer again") from error
    return content if isinstance(content, dict) else {}


def choose_boundary(wanted: Boundary | None, info: TokenizerInfo) -> Boundary:
    """The boundary rule: what is asked for, else EOS where the tokenizer has one, else BOS.

    Raises:
        ConfigError: The tokenizer lacks the marker.
    """
    if wanted is None:
        if info.eos_id is None and info.bos_id is None:
            raise ConfigError(
                f"the tokenizer {info.name} names neither a bos_token nor an eos_token, and documents need a boundary; "
                "add one to its tokenizer_config.json"
            )
        return "eos" if info.eos_id is not None else "bos"
    for marker, number in (("bos", info.bos_id), ("eos", info.eos_id)):
        if wanted in (marker, "both") and number is None:
            raise ConfigError(
                f"boundary={wanted}, but the tokenizer {info.name} names no {marker}_token; choose another boundary or "
                "add the token to its tokenizer_config.json"
            )
    if wanted == "both" and info.bos_id == info.eos_id:
        raise ConfigError(
            f"boundary=both, but the tokenizer {info.name} has one id, {info.eos_id}, for both ends; choose bos or eos"
        )
    return wanted


def choose_dtype(info: TokenizerInfo) -> TokenDtype:
    """The smallest type that holds every id."""
    return "uint16" if info.vocab_size <= _LARGEST_UINT16_VOCABULARY else "int32"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer folder's files; does nothing where they lie already.

    Raises:
        StorageError: The target cannot be written.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (target / name).is_file():
            write_atomic(target / name, (source / name).read_bytes())  # several ranks may be here at once
