"""The folders that optimize wrote -> one checked, ordered list of chunks.

Comes in: one node folder, or a folder of them. Goes out: `Sources`: the facts they share, every unit's record once, and
where each chunk lies. Guarantees: folders that do not belong together are refused with what differs; a unit that is
missing is named; a unit that two nodes made is taken once, and refused when the two differ. The order is that of the
plan, so it does not matter which node made what.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrainkit.errors import DatasetError
from pretrainkit.formats.litdata import INDEX_FILENAME, read_index
from pretrainkit.metadata import METADATA_FILENAME, DatasetInfo
from pretrainkit.records import RECORDS_FOLDER, ChunkRecord, UnitRecord, load_records
from pretrainkit.statistics import counted
from pretrainkit.verify import check_numbers

logger = logging.getLogger(__name__)

# What all sources must agree on. A tokenizer's folder name may differ; the ids it gives may not.
_SHARED = ("split", "token_dtype", "boundary", "block_size")
_SHARED_TOKENIZER = ("sha256", "vocab_size", "bos_id", "eos_id")


@dataclass(frozen=True, kw_only=True)
class SourceChunk:
    """One chunk of one unit."""

    record: ChunkRecord
    """What was recorded when it was written."""
    folders: tuple[Path, ...]
    """Where it lies: in more than one folder when several nodes made the unit."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything to be merged, in order, as the records tell it; no chunk has been opened yet."""

    folders: tuple[Path, ...]
    """The node folders, sorted."""
    info: DatasetInfo
    """What all folders share: split, tokenizer, type, boundary, block size, settings, versions; no counts."""
    records: tuple[UnitRecord, ...]
    """Each unit once, ordered by plan and unit."""
    chunks: tuple[SourceChunk, ...]
    """Chunks of all records in order."""


def find_node_folders(source_dir: Path) -> list[Path]:
    """The node folders at or directly below `source_dir`, sorted by name.

    Raises:
        DatasetError: There is none; says what is there instead.
    """
    if not source_dir.is_dir():
        raise DatasetError(f"source_dir={source_dir} is not a folder; give OUT/train or OUT/val of optimize")
    if _is_dataset(source_dir):
        return [source_dir]
    children = sorted(child for child in source_dir.iterdir() if child.is_dir() and not child.name.startswith("."))
    nodes = [child for child in children if _is_dataset(child)]
    if nodes:
        return nodes
    splits = [child.name for child in children if any(_is_dataset(c) for c in child.iterdir() if c.is_dir())]
    hint = f"; merge its splits one by one: --source_dir={source_dir / splits[0]}" if splits else ""
    raise DatasetError(f"source_dir={source_dir} holds no node folder with a {METADATA_FILENAME}{hint}")


def _is_dataset(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METADATA_FILENAME, RECORDS_FOLDER, INDEX_FILENAME))


def load_sources(source_dir: Path) -> Sources:
    """Read and compare the metadata and unit records of every node folder.

    Raises:
        DatasetError: A folder is damaged or does not belong to the others, or a unit is missing.
    """
    folders = find_node_folders(source_dir)
    loaded = [(folder, load_records(folder)) for folder in folders]
    # A node that died before its first unit was whole left empty folders: they hold nothing, so nothing is missing.
    loaded = [(f, records) for f, records in loaded if records or _is_described(f)] or loaded
    folders = [folder for folder, _ in loaded]
    infos = _load_infos(loaded)
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        _check_same(folder, info, folders[0], infos[0])
    copies: dict[tuple[str, int], list[tuple[Path, UnitRecord]]] = defaultdict(list)
    planned: dict[str, int] = {}
    for (folder, records), info in zip(loaded, infos, strict=True):
        _check_index(folder, info, records)
        for record in records:
            if record.plan not in info.plans:
                logger.warning("%s: unit %s is of a plan that was given up; left out", folder, record.unit)
                continue
            _check_record(folder, info, record)
            if planned.setdefault(record.plan, record.units_planned) != record.units_planned:
                raise DatasetError(
                    f"{folder}: unit {record.unit} says its plan has {record.units_planned} units, others say "
                    f"{planned[record.plan]}; make it again"
                )
            copies[record.plan, record.unit].append((folder, record))
    _check_complete(folders, infos, copies, planned)
    keys = sorted(copies)
    for key in keys:
        _check_copies(copies[key])
    chunks: list[SourceChunk] = []
    for key in keys:
        lies_in = tuple(folder for folder, _ in copies[key])
        chunks += [SourceChunk(record=chunk, folders=lies_in) for chunk in copies[key][0][1].chunks]
    return Sources(
        folders=tuple(folders),
        info=_shared_info(infos),
        records=tuple(copies[key][0][1] for key in keys),
        chunks=tuple(chunks),
    )


def _is_described(folder: Path) -> bool:
    return (folder / METADATA_FILENAME).exists() or (folder / INDEX_FILENAME).exists()


def _load_infos(loaded: list[tuple[Path, list[UnitRecord]]]) -> list[DatasetInfo]:
    """Each folder's metadata; a node that died before it wrote its own has that of another node of the same plan.

    Raises:
        DatasetError: No folder of the plan has any, or a folder holds no records.
    """
    own = {folder: DatasetInfo.load(folder) for folder, _ in loaded if (folder / METADATA_FILENAME).is_file()}
    by_plan = {plan: info for info in own.values() for plan in info.plans}
    infos = []
    for folder, records in loaded:
        if not (folder / RECORDS_FOLDER).is_dir():
            raise DatasetError(f"{folder} has no {RECORDS_FOLDER}/ with unit records; merge takes folders of optimize")
        info = own.get(folder) or next((by_plan[r.plan] for r in records if r.plan in by_plan), None)
        if info is None:
            raise DatasetError(
                f"{folder} has no {METADATA_FILENAME}: its node did not finish; run optimize again with the same "
                "settings, it continues"
            )
        infos.append(info)
    return infos


def _check_same(folder: Path, info: DatasetInfo, first_folder: Path, first: DatasetInfo) -> None:
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(info, name), getattr(first, name)) for name in _SHARED]
    pairs += [
        (f"tokenizer {name}", getattr(info.tokenizer, name), getattr(first.tokenizer, name))
        for name in _SHARED_TOKENIZER
    ]
    for name, mine, others in pairs:
        if mine != others:
            raise DatasetError(
                f"{folder} does not belong to {first_folder}: its {name} is {mine!r}, not {others!r}; merge only what "
                "was made with the same tokenizer and settings"
            )


def _check_index(folder: Path, info: DatasetInfo, records: list[UnitRecord]) -> None:
    """A node's index must tell the same as its records, as far as it goes; without one, the records suffice."""
    if not (folder / INDEX_FILENAME).exists():
        return
    entries, dtype = read_index(folder)
    if dtype.name != info.token_dtype:
        raise DatasetError(f"{folder}: {INDEX_FILENAME} says {dtype.name}, {METADATA_FILENAME} {info.token_dtype}")
    known = {c.filename: (c.bytes, c.items, c.tokens) for record in records for c in record.chunks}
    for entry in entries:
        if known.get(entry.filename) != (entry.chunk_bytes, entry.chunk_size, entry.dim):
            raise DatasetError(
                f"{folder}: {INDEX_FILENAME} and the unit records disagree on {entry.filename}; it is damaged or was "
                "changed by hand, run optimize again"
            )


def _check_record(folder: Path, info: DatasetInfo, record: UnitRecord) -> None:
    where = f"{folder}: unit {record.unit}"
    numbers = [record.unit, record.units_planned, record.documents_in, *record.dropped.values()]
    for kept in record.splits.values():
        numbers += [kept.documents, kept.tokens, kept.text_bytes, *kept.document_lengths.values()]
    if any(type(number) is not int or number < 0 for number in numbers) or record.unit >= record.units_planned:
        raise DatasetError(f"{where} has an impossible number in its record; it is damaged, make it again")
    if record.split != info.split or any(chunk.split != info.split for chunk in record.chunks):
        raise DatasetError(f"{where} belongs to another split than {info.split}; put it back where it was")
    for chunk in record.chunks:
        check_numbers(chunk, where)
        # Every item begins a document but the first, which may be the rest of one that began in the chunk before.
        if chunk.items - chunk.documents not in (0, 1):
            raise DatasetError(f"{where}: {chunk.filename} has {chunk.items} items for {chunk.documents} documents")
    counts = record.splits.get(info.split)
    documents, tokens = (sum(getattr(c, name) for c in record.chunks) for name in ("documents", "tokens"))
    fits = (
        counts is not None
        and (counts.documents, counts.tokens) == (documents, tokens)
        and sum(counts.document_lengths.values()) == documents
        and record.unaccounted() == 0
    )
    if not fits:
        raise DatasetError(f"{where} does not account for all of its documents; its record is damaged, make it again")


def _check_complete(
    folders: list[Path],
    infos: list[DatasetInfo],
    copies: dict[tuple[str, int], Any],
    planned: dict[str, int],
) -> None:
    """Every unit of every plan is there; else name the units, and the nodes that have not finished."""
    for info in infos:
        for plan in info.plans:
            planned.setdefault(plan, info.units_planned)
    for plan, count in sorted(planned.items()):
        found = {unit for key, unit in copies if key == plan}
        num_missing = count - len(found)  # none is beyond the plan; what a damaged record plans may be without end
        if not num_missing:
            continue
        missing = itertools.islice((unit for unit in itertools.count() if unit not in found), min(5, num_missing))
        shown = ", ".join(map(str, missing)) + (", ..." if num_missing > 5 else "")
        unfinished = [folder.name for folder in folders if not (folder / INDEX_FILENAME).exists()]
        who = f"; unfinished: {', '.join(unfinished)}" if unfinished else ""
        are = "is" if num_missing == 1 else "are"
        raise DatasetError(
            f"{num_missing:,} of the plan's {counted(count, 'unit')} {are} missing (unit {shown}){who}; found "
            f"{', '.join(folder.name for folder in folders[:5])}{', ...' if len(folders) > 5 else ''}: bring the other "
            "nodes' folders here, or run optimize again with the same settings, it continues"
        )


def _check_copies(copies: list[tuple[Path, UnitRecord]]) -> None:
    first_folder, first = copies[0]
    for folder, record in copies[1:]:
        # Two engines may have made the same ids; the chunks' checksums decide.
        if dataclasses.replace(record, engine=first.engine) != first:
            raise DatasetError(
                f"unit {first.unit} in {folder} differs from the one in {first_folder}; one of them is damaged or was "
                "made by another version: remove the wrong one"
            )


def _shared_info(infos: list[DatasetInfo]) -> DatasetInfo:
    """The facts all sources share; where they may differ, a choice that does not depend on who made what."""
    first = infos[0]
    settings = {
        name: value
        for name, value in sorted(first.settings.items())
        if all(name in info.settings and info.settings[name] == value for info in infos)
    }
    return DatasetInfo(
        split=first.split,
        tokenizer=min((info.tokenizer for info in infos), key=lambda t: t.name),
        token_dtype=first.token_dtype,
        boundary=first.boundary,
        block_size=first.block_size,
        settings=settings,
        versions=min((info.versions for info in infos), key=lambda v: sorted(v.items())),
    )
