"""The plan of a job: which rows belong to which work unit, and everything else that decides the bytes.

Comes in: listed shards, settings, a tokenizer. Goes out: `plan.json`, written before any work and never changed.
Guarantee: a plan is a function of the inputs and the settings alone, never of the number of CPUs, the machine or the
place of the files; two equal plans have equal ids, and a unit's output depends on nothing but the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.pool import ThreadPool
from typing import Any

from pretrainkit.documents import OnBadInput, ShardInfo, inspect_shard, refuse_all_bad
from pretrainkit.errors import ConfigError, DatasetError, InputError
from pretrainkit.metadata import Boundary, TokenDtype, TokenizerInfo
from pretrainkit.records import SourceRange
from pretrainkit.statistics import counted
from pretrainkit.storage import ListedFile

PLAN_FILENAME = "plan.json"
FORMAT_VERSION = 1

# Large enough that syncing a unit's files costs little, small enough that every CPU has many and a kill loses little;
# a small input is still cut into a few, so that it is not one CPU's work.
_SMALLEST_UNIT_BYTES = 8 << 20
_LARGEST_UNIT_BYTES = 128 << 20
_MOST_UNITS_WANTED = 256
_FEWEST_UNITS_WANTED = 16
_FOOTER_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What the user chose, of everything that decides the bytes."""

    text_column: str = "text"
    """Column (Parquet) or key (JSON Lines) that holds the text."""
    boundary: Boundary
    """Where boundary markers stand."""
    block_size: int | None = None
    """Tokens per training block; chunks hold whole blocks. None: chunks hold whole documents."""
    chunk_bytes: int = 64 << 20
    """Size that chunks do not exceed, unless one document does."""
    val_fraction: float = 0.0
    """Share of documents that go to the validation split, by a hash of their text."""
    engine: str = "auto"
    """Tokenizer engine asked for."""
    unit_bytes: int | None = None
    """Text per work unit; None: a 256th of the input, about 8 MiB at least, 128 MiB at most."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction} is not a share; give 0 <= val_fraction < 1")
        if self.block_size is not None and self.block_size < 2:
            raise ConfigError(f"block_size={self.block_size} holds no input and target; give at least 2")
        if not 1 << 10 <= self.chunk_bytes <= 2 << 30:
            raise ConfigError(f"chunk_bytes={self.chunk_bytes} is outside 1 KiB .. 2 GiB, LitData's limits")
        if self.block_size is not None and self.block_size * 4 > self.chunk_bytes:
            raise ConfigError(
                f"block_size={self.block_size} tokens do not fit into chunk_bytes={self.chunk_bytes}; raise chunk_bytes"
            )
        if self.unit_bytes is not None and self.unit_bytes < 1:
            raise ConfigError(f"unit_bytes={self.unit_bytes} is not positive")
        if not self.text_column:
            raise ConfigError("text_column is empty; name the column that holds the text")


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One input file."""

    name: str
    """Path relative to its folder."""
    split: str
    """"train" (with val_fraction's documents taken out) or "val" (an explicit validation file)."""
    kind: str
    """What its ranges count; see `SourceRange.kind`."""
    size: int
    """Bytes of the file."""
    fingerprint: str
    """Changes when the file changes."""
    rows: int | None
    """Rows, where the format says so."""
    problem: str | None = None
    """Why nothing can be read from it, or None."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work: ranges of shards, in order."""

    index: int
    """Number in the plan, from 0."""
    split: str
    """Split of its shards."""
    text_bytes: int
    """Estimated bytes of text."""
    ranges: tuple[tuple[int, int, int], ...]
    """(index of the shard, start, stop), as in `SourceRange`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of a dataset."""

    settings: PlanSettings
    """What the user chose."""
    tokenizer: TokenizerInfo
    """Which tokenizer makes the ids."""
    token_dtype: TokenDtype
    """Type of an id on disk."""
    engine: str
    """Engine that encodes: settings.engine, or what "auto" came to."""
    shards: tuple[PlannedShard, ...]
    """Input files: training, then validation, each sorted by name."""
    units: tuple[Unit, ...]
    """Work units in the order of their text in the dataset."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that decide the ids."""

    @cached_property
    def id(self) -> str:
        """SHA-256 over the plan, hexadecimal; the tokenizer's name is left out, for it decides nothing."""
        nameless = dataclasses.replace(self, tokenizer=dataclasses.replace(self.tokenizer, name=""))
        return hashlib.sha256(nameless.to_json().encode()).hexdigest()

    @cached_property
    def text_bytes(self) -> int:
        """Estimated bytes of text in all."""
        return sum(unit.text_bytes for unit in self.units)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Splits that this plan fills: "train", and "val" where there is one."""
        has_val = self.settings.val_fraction > 0 or any(shard.split == "val" for shard in self.shards)
        return ("train", "val") if has_val else ("train",)

    def sources(self, unit: Unit) -> Iterator[tuple[PlannedShard, SourceRange]]:
        """The shards and ranges behind a unit, in order."""
        for index, start, stop in unit.ranges:
            shard = self.shards[index]
            yield shard, SourceRange(shard=shard.name, kind=shard.kind, start=start, stop=stop)

    def to_json(self) -> str:
        """This plan as JSON text; the same plan gives the same text."""
        raw = {
            "format_version": FORMAT_VERSION,
            "settings": dataclasses.asdict(self.settings),
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "token_dtype": self.token_dtype,
            "engine": self.engine,
            "versions": self.versions,
            "shards": [vars(shard) for shard in self.shards],
            "units": [[unit.split, unit.text_bytes, unit.ranges] for unit in self.units],
        }
        return json.dumps(raw, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = PLAN_FILENAME) -> Plan:
        """Read `to_json` back.

        Raises:
            DatasetError: Damaged, or of another version; names `source`.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("format_version")
            if version != FORMAT_VERSION:
                raise DatasetError(f"{source} has version {version}, {FORMAT_VERSION} is due; use a new output folder")
            units = [
                Unit(index=index, split=split, text_bytes=size, ranges=tuple((a, b, c) for a, b, c in ranges))
                for index, (split, size, ranges) in enumerate(raw.pop("units"))
            ]
            return cls(
                settings=PlanSettings(**raw.pop("settings")),
                tokenizer=TokenizerInfo(**raw.pop("tokenizer")),
                shards=tuple(PlannedShard(**shard) for shard in raw.pop("shards")),
                units=tuple(units),
                **raw,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DatasetError(f"{source} is damaged ({error}); use a new output folder") from error


def make_plan(
    files: Sequence[tuple[str, ListedFile]],
    settings: PlanSettings,
    tokenizer: TokenizerInfo,
    token_dtype: TokenDtype,
    on_bad_input: OnBadInput,
) -> Plan:
    """Look at every shard and cut the whole into units; the engine is still the one asked for.

    Args:
        files: (split, file) of every shard, in the order of the dataset.
        settings: What the user chose.
        tokenizer: Which tokenizer.
        token_dtype: Type of an id on disk.
        on_bad_input: "fail" refuses shards that cannot be used, before any work.

    Raises:
        InputError: Nothing to read, or a shard that cannot be used.
    """
    # Threads wait for disks and networks, and hardly compute. For this kind nobody waits: one that a silent store keeps
    # must not hold up Ctrl+C.
    with ThreadPool(_FOOTER_THREADS) as pool:
        infos = pool.map(lambda item: inspect_shard(item[1], settings.text_column), files)
    problems = [(f.name, info.problem) for (_, f), info in zip(files, infos, strict=True) if info.problem is not None]
    if problems and (on_bad_input == "fail" or len(problems) == len(files)):
        raise refuse_all_bad(problems)
    shards = tuple(
        PlannedShard(
            name=file.name,
            split=split,
            kind=info.kind,
            size=file.size,
            fingerprint=info.fingerprint,
            rows=_rows(info),
            problem=info.problem,
        )
        for (split, file), info in zip(files, infos, strict=True)
    )
    units = tuple(_cut_into_units(shards, infos, settings.unit_bytes))
    if not units:
        raise InputError(f"there are no rows in the {counted(len(files), 'input file')}; nothing is to do")
    return Plan(
        settings=settings,
        tokenizer=tokenizer,
        token_dtype=token_dtype,
        engine=settings.engine,
        shards=shards,
        units=units,
        versions={name: importlib.metadata.version(name) for name in ("gigatoken", "tokenizers")},
    )


def _rows(info: ShardInfo) -> int | None:
    rows = [piece.rows for piece in info.pieces]
    return None if info.kind != "row_group" else sum(count for count in rows if count is not None)


def _cut_into_units(
    shards: Sequence[PlannedShard], infos: Sequence[ShardInfo], unit_bytes: int | None
) -> Iterator[Unit]:
    """Neighbouring pieces joined until a unit is full; a unit may span shards, but not splits."""
    total = sum(piece.text_bytes for info in infos for piece in info.pieces)
    smallest = min(_SMALLEST_UNIT_BYTES, total // _FEWEST_UNITS_WANTED)
    limit = unit_bytes or min(_LARGEST_UNIT_BYTES, max(smallest, total // _MOST_UNITS_WANTED))
    index, size, ranges, split = 0, 0, list[tuple[int, int, int]](), "train"
    for number, start, stop, text_bytes in _all_pieces(infos):
        if ranges and (size + text_bytes > limit or shards[number].split != split):
            yield Unit(index=index, split=split, text_bytes=size, ranges=tuple(ranges))
            index, size, ranges = index + 1, 0, []
        split = shards[number].split
        size += text_bytes
        if ranges and ranges[-1][0] == number and ranges[-1][2] == start:
            ranges[-1] = (number, ranges[-1][1], stop)
        else:
            ranges.append((number, start, stop))
    if ranges:
        yield Unit(index=index, split=split, text_bytes=size, ranges=tuple(ranges))


def _all_pieces(infos: Iterable[ShardInfo]) -> Iterator[tuple[int, int, int, int]]:
    """(index of the shard, start, stop, text bytes) of every piece; a shard that cannot be used is one empty piece."""
    for number, info in enumerate(infos):
        if info.problem is not None:
            yield number, 0, 0, 0
        for piece in info.pieces:
            yield number, piece.start, piece.stop, piece.text_bytes


def differences(old: Plan, new: Plan) -> list[str]:
    """What a second run would do otherwise than the first, in words; what "auto" came to is no difference."""
    found: list[str] = []
    groups: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("", dataclasses.asdict(old.settings), dataclasses.asdict(new.settings)),
        ("tokenizer ", dataclasses.asdict(old.tokenizer), dataclasses.asdict(new.tokenizer)),
        ("version of ", old.versions, new.versions),
    ]
    for prefix, before, after in groups:
        found += [
            f"{prefix}{name} was {before.get(name)}, is {after.get(name)}"
            for name in sorted({*before, *after})
            if before.get(name) != after.get(name) and (prefix, name) != ("tokenizer ", "name")
        ]
    shards_before = {(shard.split, shard.name): shard for shard in old.shards}
    shards_after = {(shard.split, shard.name): shard for shard in new.shards}
    changes = {
        "added": sorted(shards_after.keys() - shards_before.keys()),
        "removed": sorted(shards_before.keys() - shards_after.keys()),
        "changed": sorted(k for k in shards_before.keys() & shards_after.keys() if shards_before[k] != shards_after[k]),
    }
    for what, keys in changes.items():
        if keys:
            names = ", ".join(name for _, name in keys[:3]) + (", ..." if len(keys) > 3 else "")
            found.append(f"{counted(len(keys), 'input file')} {what}: {names}")
    if not found and old.units != new.units:
        found.append("the inputs are cut into other units")
    return found
