"""The target folder's state: empty, ours and unfinished, ours and complete, or somebody else's.

Comes in: the fingerprint of a merge, which is a hash over everything that determines its bytes. Goes out: a folder
that is marked while it is being filled, and published by its `index.json`. Guarantees: a folder that holds anything
else is never written to; whoever finds an interrupted merge can go on with it, if it is the same merge; `index.json`
is the last file written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrainkit.errors import DatasetError, StorageError, TokenizerError
from pretrainkit.formats.litdata import INDEX_FILENAME, ChunkEntry, write_index
from pretrainkit.merge.sources import Sources
from pretrainkit.metadata import METADATA_FILENAME, TOKENIZER_FOLDER, DatasetInfo
from pretrainkit.records import ChunkRecord
from pretrainkit.storage import fsync_folder, read_description, storage_errors, write_atomic
from pretrainkit.verify import CHECKSUMS_FILENAME, read_checksums, write_checksums

# Holds the fingerprint of the merge that is under way.
MARK = ".merging"
_LOCK = ".lock"
OURS = {MARK, _LOCK, TOKENIZER_FOLDER, INDEX_FILENAME, METADATA_FILENAME, CHECKSUMS_FILENAME}


def is_finished(target_dir: Path, fingerprint: str) -> bool:
    """Whether the target is this merge, complete and with every file at its size.

    Raises:
        StorageError: The target holds anything else than this merge.
    """
    if not target_dir.exists():
        return False
    if not target_dir.is_dir():
        raise StorageError(f"target_dir={target_dir} is a file; give a folder")
    with storage_errors(f"read {target_dir}"):
        names = sorted(p.name for p in target_dir.iterdir() if p.name != _LOCK and not is_temporary(p.name))
    if not names:
        return False
    theirs, chunks = fingerprint_of(target_dir)
    if theirs is None:
        raise StorageError(f"target_dir={target_dir} holds other data ({names[0]}); give a new or empty folder")
    if theirs != fingerprint:
        raise StorageError(
            f"target_dir={target_dir} holds another merge, of other sources; give a new or empty folder, or remove it"
        )
    if MARK in names or INDEX_FILENAME not in names or METADATA_FILENAME not in names:
        return False
    paths = [(target_dir / chunk.filename, chunk.bytes) for chunk in chunks]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def fingerprint_of(target_dir: Path) -> tuple[str | None, list[ChunkRecord]]:
    """The fingerprint a folder carries, from its mark or its checksums, or None."""
    if (target_dir / MARK).is_file():
        return read_description(target_dir / MARK).strip(), []
    if (target_dir / CHECKSUMS_FILENAME).is_file():
        return read_checksums(target_dir)
    return None, []


def claim(target_dir: Path, fingerprint: str, filenames: Iterable[str]) -> None:
    """Mark the folder as ours; a finished dataset that turned out damaged is unpublished until it is whole again.

    Args:
        target_dir: The folder, locked by the caller.
        fingerprint: This merge.
        filenames: Chunks it is about to write.

    Raises:
        StorageError: A file lies there that is no part of this merge.
    """
    ours = OURS | set(filenames)
    for path in sorted(target_dir.iterdir()):
        if path.name not in ours and not is_temporary(path.name):
            raise StorageError(
                f"target_dir={target_dir} holds {path.name}, which is no part of this merge; move it away"
            )
    write_atomic(target_dir / MARK, fingerprint + "\n")
    (target_dir / INDEX_FILENAME).unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a name is one that an interrupted write of a dataset's file leaves behind."""
    return name.startswith(".") and name.endswith(".tmp")


def copy_tokenizer_of(sources: Sources, target_dir: Path) -> None:
    """Copy the tokenizer's files from the first node folder that holds the very tokenizer of the metadata.

    Raises:
        DatasetError: None of them does.
    """
    from pretrainkit.tokenizers.folder import copy_tokenizer, tokenizer_file

    for folder in sources.folders:
        source = folder / TOKENIZER_FOLDER
        # A link could lead to a file that has no business beside a dataset.
        if source.is_symlink() or not source.is_dir() or any(path.is_symlink() for path in source.iterdir()):
            continue
        try:
            _, path = tokenizer_file(source)
        except TokenizerError:
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() == sources.info.tokenizer.sha256:
            copy_tokenizer(source, target_dir / TOKENIZER_FOLDER)
            return
    raise DatasetError(
        f"no {TOKENIZER_FOLDER}/ beside the sources holds the tokenizer {sources.info.tokenizer.name} that made them; "
        f"put its files into {sources.folders[0] / TOKENIZER_FOLDER}"
    )


def publish(
    target_dir: Path, fingerprint: str, info: DatasetInfo, chunks: Sequence[ChunkRecord], chunk_bytes: int
) -> None:
    """Write what describes the dataset; the index last, and only when everything else is on the disk.

    Args:
        target_dir: Folder that holds the chunks.
        fingerprint: This merge.
        info: What the dataset holds.
        chunks: Every chunk, in order.
        chunk_bytes: Size that chunks were aimed at.
    """
    write_checksums(target_dir, fingerprint, chunks)  # from here on, the folder is known by them
    write_atomic(target_dir / METADATA_FILENAME, info.to_json())
    (target_dir / MARK).unlink()
    for path in [*target_dir.iterdir(), *(target_dir / TOKENIZER_FOLDER).iterdir()]:
        if is_temporary(path.name):
            path.unlink()
    fsync_folder(target_dir)
    entries = [ChunkEntry(c.filename, c.bytes, c.items, c.tokens) for c in chunks]
    write_index(target_dir, entries, info.token_dtype, chunk_bytes, fingerprint)
