"""Node folders: which units are done, and the index and metadata that make each folder a dataset by itself.

Comes in: the records in `OUT/<split>/<node>/units/`. Goes out: the set of finished units, and for each folder
`index.json`, `metadata.json` and the tokenizer's files. Guarantee: what is written follows from the records alone, so
whoever writes it, and however often, the bytes are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from pretrainkit.errors import DatasetError
from pretrainkit.formats.litdata import INDEX_FILENAME, ChunkEntry, write_index
from pretrainkit.locks import folder_lock
from pretrainkit.metadata import METADATA_FILENAME, TOKENIZER_FOLDER, DatasetInfo
from pretrainkit.plan import Plan
from pretrainkit.records import RECORDS_FOLDER, SPLITS, UnitRecord, add_counts, record_name
from pretrainkit.remote import filesystem
from pretrainkit.storage import (
    fsync_folder,
    is_remote,
    join,
    process_mark,
    read_bytes,
    remove,
    sweep_drafts,
    write_atomic,
)
from pretrainkit.tokenizers.folder import copy_tokenizer
from pretrainkit.units.work import STAGE_PREFIX


def node_folders(output_dir: str, split: str) -> list[str]:
    """Names of the node folders of one split that hold records, sorted."""
    base = join(output_dir, split)
    if is_remote(base):
        fs, inner = filesystem(base)
        found = fs.find(inner) if fs.exists(inner) else []
        parts = [path.removeprefix(inner.rstrip("/") + "/").split("/") for path in found]
        return sorted({part[0] for part in parts if len(part) == 3 and part[1] == RECORDS_FOLDER})
    if not os.path.isdir(base):
        return []
    return sorted(entry.name for entry in os.scandir(base) if os.path.isdir(join(base, entry.name, RECORDS_FOLDER)))


def read_records(folder: str, plan_id: str) -> list[UnitRecord]:
    """The records of one plan in one node folder, in unit order; damaged ones and those of other plans are left out."""
    if is_remote(folder):
        fs, inner = filesystem(join(folder, RECORDS_FOLDER))
        texts = [(path, data.decode()) for path, data in sorted(fs.cat(fs.find(inner)).items())]
    else:
        base = join(folder, RECORDS_FOLDER)
        names = sorted(name for name in os.listdir(base) if name.endswith(".json") and not name.startswith("."))
        texts = [(join(base, name), read_bytes(join(base, name)).decode(errors="replace")) for name in names]
    records = []
    for path, text in texts:
        with contextlib.suppress(DatasetError):  # a damaged record counts as none: its unit is done again
            record = UnitRecord.from_json(text, path)
            if record.plan == plan_id and _chunks_stand(folder, record):
                records.append(record)
    return records


def _chunks_stand(folder: str, record: UnitRecord) -> bool:
    """Whether every chunk has its size; contents are verified at merge. Object stores keep what they acknowledged."""
    if is_remote(folder):
        return True
    try:
        return all(os.path.getsize(join(folder, chunk.filename)) == chunk.bytes for chunk in record.chunks)
    except FileNotFoundError:
        return False


def finished_units(output_dir: str, plan: Plan) -> dict[int, UnitRecord]:
    """Unit -> its training record, for every unit that is whole: records of all its splits stand, with their chunks."""
    done: dict[int, UnitRecord] = {}
    for node in node_folders(output_dir, "train"):
        records = read_records(join(output_dir, "train", node), plan.id)
        if "val" in plan.splits and records:
            val_folder = join(output_dir, "val", node)
            whole = {r.unit for r in read_records(val_folder, plan.id)} if _has_records(val_folder) else set()
            records = [record for record in records if record.unit in whole]
        for record in records:
            done.setdefault(record.unit, record)
    return done


def _has_records(folder: str) -> bool:
    return is_remote(folder) or os.path.isdir(join(folder, RECORDS_FOLDER))


def finish_node(output_dir: str, node: str, plan: Plan, tokenizer_dir: Path) -> None:
    """Make each of a node's folders a dataset by itself.

    Raises:
        StorageError: The output cannot be written.
    """
    for split in plan.splits:
        folder = join(output_dir, split, node)
        if not _has_records(folder):
            continue
        # Several ranks of one node may get here at once; the last one must see every record.
        lock = contextlib.nullcontext() if is_remote(folder) else folder_lock(folder, "optimize", wait=True)
        with lock:
            records = read_records(folder, plan.id)
            if not is_remote(folder):
                fsync_folder(join(folder, RECORDS_FOLDER))
            _copy_tokenizer(tokenizer_dir, join(folder, TOKENIZER_FOLDER))
            _write_dataset(folder, split, records, plan)  # its index comes last: what has one is complete


def _write_dataset(folder: str, split: str, records: list[UnitRecord], plan: Plan) -> None:
    chunks = [chunk for record in records for chunk in record.chunks]
    counts = [record.splits[split] for record in records]
    info = DatasetInfo(
        split=split,
        tokenizer=plan.tokenizer,
        token_dtype=plan.token_dtype,
        boundary=plan.settings.boundary,
        block_size=plan.settings.block_size,
        documents=sum(count.documents for count in counts),
        tokens=sum(count.tokens for count in counts),
        text_bytes=sum(count.text_bytes for count in counts),
        chunks=len(chunks),
        max_token_id=max((chunk.max_token_id for chunk in chunks), default=0),
        documents_in=sum(record.documents_in for record in records),
        dropped=add_counts(record.dropped for record in records),
        document_lengths=add_counts(count.document_lengths for count in counts),
        plans=[plan.id],
        units=len(records),
        units_planned=len(plan.units),
        settings={**vars(plan.settings), "engine": plan.engine},
        versions=plan.versions,
    )
    write_atomic(join(folder, METADATA_FILENAME), info.to_json())
    entries = [ChunkEntry(c.filename, chunk_bytes=c.bytes, chunk_size=c.items, dim=c.tokens) for c in chunks]
    fingerprint = hashlib.sha256("".join(chunk.checksum for chunk in chunks).encode()).hexdigest()
    write_index(folder, entries, plan.token_dtype, plan.settings.chunk_bytes, fingerprint)


def _copy_tokenizer(tokenizer_dir: Path, target: str) -> None:
    if not is_remote(target):
        copy_tokenizer(tokenizer_dir, Path(target))
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy_tokenizer(tokenizer_dir, Path(temporary))
        for path in sorted(Path(temporary).iterdir()):
            write_atomic(join(target, path.name), path.read_bytes())


def fetch_tokenizer(source: str) -> Path:
    """A local folder with a remote tokenizer's files; it lives as long as this machine's temporary files."""
    fs, inner = filesystem(source)
    local = Path(tempfile.mkdtemp(prefix="pretrainkit-tokenizer-"))
    for path in fs.find(inner):
        (local / path.rsplit("/", 1)[-1]).write_bytes(fs.cat_file(path))
    return local


def sweep(output_dir: str) -> None:
    """Remove what dead processes of this machine left: folders of unfinished units and drafts of small files.

    Other machines' are left alone, and so is everything that does not bear one of our own names.
    """
    stage = re.compile(
        rf"{re.escape(f'{STAGE_PREFIX}{socket.gethostname()}')}-(?P<mark>(?P<pid>\d+)-\d+)-\d+-\w{{8}}", re.ASCII
    )
    base = Path(output_dir)
    nodes = sorted(path for split in SPLITS for path in (base / split).glob("*") if path.is_dir())
    for node in nodes:
        for path in sorted(node.glob(f"{STAGE_PREFIX}*")):
            found = stage.fullmatch(path.name)
            if found is not None and process_mark(int(found["pid"])) != found["mark"]:
                shutil.rmtree(path, ignore_errors=True)
    for folder in (base, *nodes):
        sweep_drafts(folder)
        sweep_drafts(folder / TOKENIZER_FOLDER)


def discard_records(output_dir: str, plan: Plan) -> None:
    """Take back the records of a plan that no longer counts, and the indexes over them.

    Their chunks stay: the new plan's chunks have the same names, and another rank may be writing one now.
    """
    for split in plan.splits:
        for node in node_folders(output_dir, split):
            folder = join(output_dir, split, node)
            remove(join(folder, INDEX_FILENAME))
            for record in read_records(folder, plan.id):
                remove(join(folder, record_name(record.unit)))
