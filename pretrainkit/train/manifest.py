"""A folder's files with their sizes and hashes: what makes a checkpoint whole, and shows every flipped bit.

Comes in: a checkpoint folder. Goes out: `manifest.json`, written last, so that its presence means "complete".
Guarantee: a folder whose manifest verifies holds the very bytes that were hashed when it was saved, the manifest's own
included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pretrainkit.errors import CheckpointError
from pretrainkit.storage import checksum, write_atomic

MANIFEST_FILENAME = "manifest.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file as it was saved."""

    bytes: int
    """Size."""
    xxh3_128: str
    """Checksum, 32 hexadecimal digits."""


Files = dict[str, FileEntry]


def hash_files(folder: Path, names: Sequence[str]) -> Files:
    """Entries for some of a folder's files, named relative to it with forward slashes."""
    return {
        name: FileEntry(bytes=(folder / name).stat().st_size, xxh3_128=checksum(folder / name))
        for name in sorted(names)
    }


def write_manifest(folder: Path, step: int, files: Files) -> None:
    """Declare a checkpoint complete.

    Raises:
        StorageError: The folder cannot be written.
    """
    write_atomic(folder / MANIFEST_FILENAME, _serialise(step, files))


def _serialise(step: int, files: Files) -> str:
    import xxhash

    listed = {name: {"bytes": entry.bytes, "xxh3_128": entry.xxh3_128} for name, entry in sorted(files.items())}
    content = {"format_version": _FORMAT_VERSION, "step": step, "files": listed}
    own = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, "xxh3_128": own}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> tuple[int, Files]:
    """(step, files) of a complete checkpoint.

    Raises:
        CheckpointError: No manifest (the save was not finished), or a damaged one.
    """
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST_FILENAME}: it is no checkpoint, or its save was interrupted")
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        step = int(content["step"])
        # Byte for byte what we would write: a flipped bit anywhere in the file shows.
        whole = raw == _serialise(step, files).encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged; take another checkpoint") from error
    unsafe = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if not whole or unsafe:
        raise CheckpointError(f"{path} is damaged; take another checkpoint")
    return step, files


def verify_files(folder: Path, files: Files, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with every `parts`-th file, in words; [] when they are as they were saved."""
    wrong: list[str] = []
    for name in sorted(files)[part::parts]:
        entry, path = files[name], folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes instead of {entry.bytes:,}")
        elif checksum(path) != entry.xxh3_128:
            wrong.append(f"{name} is not what was saved (its checksum differs)")
    return wrong
