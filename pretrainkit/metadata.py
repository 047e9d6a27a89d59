"""What a dataset is made of: `metadata.json` <-> `DatasetInfo`.

Comes in: the facts a stage knows about the dataset it wrote. Goes out: one JSON file beside `index.json` that says
which tokenizer, type, boundary rule and settings made the tokens, and accounts for every document. Guarantee: the file
is a pure function of inputs and settings; it holds no time stamp, host name or path of the machine that wrote it, so
the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pretrainkit.errors import DatasetError
from pretrainkit.records import check_histogram
from pretrainkit.registry import did_you_mean
from pretrainkit.storage import read_description

METADATA_FILENAME = "metadata.json"
TOKENIZER_FOLDER = "tokenizer"  # beside metadata.json: a copy of the tokenizer folder's files
FORMAT_VERSION = 1

Boundary = Literal["bos", "eos", "both"]
TokenDtype = Literal["uint16", "int32"]

# What can become of a row that is not kept. "tail": a document wholly in the tokens left out at the very end.
DROP_REASONS = ("empty", "null", "not_text", "too_long", "bad_file", "bad_row", "tail")


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Which tokenizer made the ids; two datasets fit together when these are equal."""

    name: str
    """Folder name the tokenizer was read from; for people, not compared."""
    sha256: str
    """SHA-256 over the files that define the ids (tokenizer.json or tokenizer.model)."""
    vocab_size: int
    """Largest id the tokenizer can give, plus one (added tokens included)."""
    bos_id: int | None = None
    """Id written before each document, when the boundary rule says so."""
    eos_id: int | None = None
    """Id written after each document, when the boundary rule says so."""

    def __post_init__(self) -> None:
        ids = [marker for marker in (self.bos_id, self.eos_id) if marker is not None]
        if not all(isinstance(text, str) for text in (self.name, self.sha256)) or any(type(i) is not int for i in ids):
            raise TypeError("a name, a hash or an id")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One dataset: a node's output or a merged one, of one split."""

    split: str
    """"train" or "val"."""
    tokenizer: TokenizerInfo
    """Which tokenizer made the ids."""
    token_dtype: TokenDtype
    """Type of an id on disk; uint16 below 65,536 ids, else int32."""
    boundary: Boundary
    """Where boundary markers stand: exactly one at the chosen end (both: one at each end) of every document."""
    block_size: int | None = None
    """Tokens a chunk's count is a multiple of (a training block: model block_size + 1); None when not aligned."""
    documents: int = 0
    """Documents in this dataset."""
    tokens: int = 0
    """Tokens on disk, boundary markers included."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents in this dataset; tokens / text_bytes converts loss to bits per byte."""
    chunks: int = 0
    """Chunk files."""
    max_token_id: int = 0
    """Largest id that occurs; a model's padded vocabulary must exceed it."""
    documents_in: int = 0
    """Rows read from the inputs by the units behind this dataset, whatever became of them (both splits)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that became no document, by reason (see DROP_REASONS); documents_in = kept in all splits + sum(dropped)."""
    tail_tokens: int = 0
    """Tokens left out at the very end because they fill no whole block; 0 when block_size is None."""
    document_lengths: dict[str, int] = field(default_factory=dict)
    """Histogram: "2^k" -> documents of [2^k, 2^(k+1)) tokens, boundary markers included."""
    plans: list[str] = field(default_factory=list)
    """Hash of every plan behind this dataset."""
    units: int = 0
    """Work units whose output is here."""
    units_planned: int = 0
    """Work units the plans hold in all; equal to `units` when nothing is missing."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that determine the bytes, as the plan fixed them."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that determine the bytes."""
    format_version: int = FORMAT_VERSION
    """Version of this file's layout."""

    def __post_init__(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        numbers |= {"vocab_size": self.tokenizer.vocab_size, "block_size": self.block_size or 0}
        numbers |= {f"dropped.{name}": count for name, count in self.dropped.items()}
        for name, value in numbers.items():
            if type(value) is not int or value < 0:
                raise DatasetError(f"{name} is {value!r}, not a count; the dataset's description is damaged")
        for name, value, known in (
            ("token_dtype", self.token_dtype, get_args(TokenDtype)),
            ("boundary", self.boundary, get_args(Boundary)),
        ):
            if value not in known:
                raise DatasetError(f"{name} is {value!r}, not one of {', '.join(known)}; the description is damaged")
        check_histogram(self.document_lengths)
        if not (isinstance(self.settings, dict) and isinstance(self.versions, dict)):
            raise TypeError("settings and versions hold names and values")
        if not all(isinstance(plan, str) for plan in self.plans):
            raise DatasetError(f"plans is {self.plans!r}, not a list of hashes; the dataset's description is damaged")

    def to_json(self) -> str:
        """This record as JSON text with sorted keys, ending in a newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = METADATA_FILENAME) -> DatasetInfo:
        """Read `to_json` back.

        Raises:
            DatasetError: Not JSON, an unknown or missing key, or a newer layout; names `source`.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{source} is not JSON ({error}); the dataset is damaged, make it again") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("tokenizer"), dict):
            raise DatasetError(f"{source} holds no dataset description; the dataset is damaged, make it again")
        if raw.get("format_version") != FORMAT_VERSION:
            raise DatasetError(
                f"{source} has format_version {raw.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
                "make the dataset again or install the version that wrote it"
            )
        tokenizer = _build(TokenizerInfo, raw.pop("tokenizer"), f"{source}: tokenizer")
        info: DatasetInfo = _build(cls, {**raw, "tokenizer": tokenizer}, source)
        return info

    @classmethod
    def load(cls, folder: str | Path) -> DatasetInfo:
        """Read `folder/metadata.json`.

        Raises:
            DatasetError: The file is missing or damaged.
        """
        path = Path(folder) / METADATA_FILENAME
        if not path.is_file():
            raise DatasetError(f"{folder} has no {METADATA_FILENAME}; give a folder that optimize or merge wrote")
        return cls.from_json(read_description(path), str(path))


def _build(cls: type, values: dict[str, Any], source: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise DatasetError(f"{source} has an unknown key {unknown[0]!r} (near: {', '.join(near) or 'none'})")
    required = {f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise DatasetError(f"{source} lacks the key {missing[0]!r}; the dataset is damaged, make it again")
    try:
        return cls(**values)
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from error
    except (TypeError, AttributeError) as error:
        raise DatasetError(f"{source} holds values of other types ({error}); it is damaged, make it again") from error
