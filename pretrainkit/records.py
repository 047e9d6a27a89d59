"""What became of one work unit: `units/{unit:08d}.json` <-> `UnitRecord`.

Comes in: the counts and chunks of one finished unit and one split. Goes out: a small JSON file beside the chunks.
Guarantee: the file is written after the chunks it names, so its presence means they are whole; it holds no time stamp,
host name or absolute path, so the same plan gives the same bytes on every node.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrainkit.errors import DatasetError
from pretrainkit.storage import read_description

RECORDS_FOLDER = "units"
SPLITS = ("train", "val")
CHUNK_NAME = re.compile(r"chunk-\d+-\d+\.bin", re.ASCII)
_LENGTH_NAME = re.compile(r"2\^\d\d?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """One chunk file as it was written."""

    filename: str
    """Plain name `chunk-{unit}-{i}.bin`, in the record's own folder."""
    split: str
    """"train" or "val"."""
    documents: int
    """Documents that begin in this chunk."""
    items: int
    """LitData items: documents, or pieces where a block boundary cuts one."""
    tokens: int
    """Tokens in the chunk, boundary markers included."""
    bytes: int
    """Size of the file."""
    checksum: str
    """XXH3-128 of the file's bytes, 32 hexadecimal digits."""
    max_token_id: int
    """Largest id in the chunk."""


@dataclass(frozen=True, kw_only=True)
class SourceRange:
    """A run of rows of one shard."""

    shard: str
    """Path relative to the input folder, or the URL."""
    kind: str
    """What start and stop count: "row_group" (Parquet), "byte" (JSONL) or "file" (a shard that cannot be opened)."""
    start: int
    """First one."""
    stop: int
    """One past the last; 0 for "file" and for a compressed JSONL shard that is read whole."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Where one piece of input could not be used, and why."""

    shard: str
    """Path relative to the input folder, or the URL."""
    row_group: int | None
    """Row group (Parquet), or None."""
    row: int | None
    """Row of the shard (Parquet: of the row group), or None when the whole row group or file is bad."""
    reason: str
    """One of metadata.DROP_REASONS."""
    detail: str
    """What was wrong, for people."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What one unit gave to one split."""

    documents: int = 0
    """Documents kept."""
    tokens: int = 0
    """Tokens kept, boundary markers included."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents kept."""
    document_lengths: dict[str, int] = field(default_factory=dict)
    """Histogram: "2^k" -> documents of [2^k, 2^(k+1)) tokens, boundary markers included."""


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What became of one work unit, in the folder of one split."""

    plan: str
    """Plan id: SHA-256 over the plan, hexadecimal."""
    unit: int
    """Number of the unit in the plan, from 0."""
    units_planned: int
    """Units the plan holds in all."""
    split: str
    """Split of the folder this record lies in."""
    documents_in: int
    """Rows read, whatever became of them."""
    dropped: dict[str, int]
    """Rows that became no document, by reason; documents_in = documents of all splits + sum(dropped)."""
    splits: dict[str, SplitCounts]
    """Split -> what the unit gave it; both splits stand in both records."""
    chunks: tuple[ChunkRecord, ...]
    """Chunks of this record's split only, in order."""
    source: tuple[SourceRange, ...]
    """The rows behind this unit, in order."""
    engine: str
    """Tokenizer engine whose ids these are."""
    failures: tuple[Failure, ...] = ()
    """The first bad pieces of input, located; `dropped` counts them all."""

    def __post_init__(self) -> None:
        for chunk in self.chunks:
            # A record decides what is linked, moved and deleted: a name that leaves the folder is an attack or damage.
            if not CHUNK_NAME.fullmatch(chunk.filename):
                raise DatasetError(f"unit {self.unit} names the chunk {chunk.filename!r}, not chunk-N-N.bin")
        texts = [self.plan, self.split, self.engine, *(chunk.checksum for chunk in self.chunks)]
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.dropped, dict):
            raise TypeError("a value of another type")
        for counts in self.splits.values():
            check_histogram(counts.document_lengths)

    def unaccounted(self) -> int:
        """Rows read that are neither kept nor counted as dropped; anything but 0 is a bug of ours."""
        return self.documents_in - sum(s.documents for s in self.splits.values()) - sum(self.dropped.values())

    def to_json(self) -> str:
        """This record as JSON text with sorted keys, ending in a newline."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "unit record") -> UnitRecord:
        """Read `to_json` back.

        Raises:
            DatasetError: Not JSON, a key too many or too few, or a chunk name that leaves the folder; names `source`.
        """
        try:
            raw = json.loads(text)
            raw["chunks"] = tuple(ChunkRecord(**chunk) for chunk in raw["chunks"])
            raw["source"] = tuple(SourceRange(**part) for part in raw["source"])
            raw["failures"] = tuple(Failure(**failure) for failure in raw["failures"])
            raw["splits"] = {name: SplitCounts(**counts) for name, counts in raw["splits"].items()}
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DatasetError(f"{source} is no unit record ({error}); run optimize again to make it anew") from error


def record_name(unit: int) -> str:
    """Path of a unit's record relative to its node folder."""
    return f"{RECORDS_FOLDER}/{unit:08d}.json"


def chunk_name(unit: int, index: int) -> str:
    """Name of a unit's chunk, unique in the whole dataset."""
    return f"chunk-{unit}-{index}.bin"


def length_histogram(lengths: Any) -> dict[str, int]:
    """Document lengths in tokens (1-D integer array, all > 0) -> {"2^k": count}, keys in ascending k."""
    import numpy as np

    # frexp: length = mantissa * 2**exponent with 0.5 <= mantissa < 1, so 2^k <= length < 2^(k+1) has exponent k + 1.
    exponents = np.frexp(np.asarray(lengths, dtype=np.float64))[1]
    return {f"2^{k - 1}": int(count) for k, count in enumerate(np.bincount(exponents)) if count}


def check_histogram(histogram: object) -> None:
    """Refuse what `length_histogram` cannot have made.

    Raises:
        TypeError: It is none.
    """
    fits = isinstance(histogram, dict) and all(
        _LENGTH_NAME.fullmatch(name) and type(count) is int and count > 0 for name, count in histogram.items()
    )
    if not fits:
        raise TypeError("document_lengths is no histogram")


def add_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum of several {name: count}, zeros left out, keys sorted (2^k by k)."""
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return {name: total[name] for name in sorted(total, key=lambda n: (len(n), n)) if total[name]}


def load_records(folder: str | Path) -> list[UnitRecord]:
    """Every unit record of a local node folder, in unit order; [] when it has none.

    Raises:
        DatasetError: A record is damaged.
    """
    base = Path(folder) / RECORDS_FOLDER
    names = sorted(os.listdir(base)) if base.is_dir() else []  # glob() takes a folder without permission for empty
    return [
        UnitRecord.from_json(read_description(base / name), str(base / name))
        for name in names
        if name.endswith(".json")
    ]
