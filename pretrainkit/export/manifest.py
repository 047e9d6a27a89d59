"""`manifest.json`: what a finished folder holds, file by file, with sizes and hashes.

Training writes it last into a checkpoint, and convert and export into theirs, so its presence means complete, and every
flipped bit is found before the weights are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pretrainkit.errors import CheckpointError
from pretrainkit.storage import checksum

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file as it was written."""

    bytes: int
    """Size."""
    xxh3_128: str
    """XXH3-128 of its bytes, 32 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished folder."""

    kind: str
    """What the folder is: "checkpoint", or the kind of export."""
    files: dict[str, FileEntry]
    """Path relative to the folder -> entry."""


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None when it has none.

    Raises:
        CheckpointError: The manifest is damaged, or names files outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {
            str(name): FileEntry(bytes=int(entry["bytes"]), xxh3_128=str(entry["xxh3_128"]))
            for name, entry in content["files"].items()
        }
        kind = str(content.get("kind", "checkpoint"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); the folder cannot be checked, use another one") from error
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names a file outside of its folder, {name!r}; do not trust it")
    return Manifest(kind=kind, files=files)


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files with the manifest: sizes first, then every byte.

    Raises:
        CheckpointError: A file is missing or has changed since it was written; names it.
    """
    names = sorted(names)
    for name in names:
        expected = manifest.files[name].bytes
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing; use another checkpoint")
        if (found := path.stat().st_size) != expected:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {found} bytes of {expected}; use another checkpoint"
            )
    for name in names:
        if checksum(folder / name) != manifest.files[name].xxh3_128:
            raise CheckpointError(
                f"{folder} is damaged: {name} is not what was written (its hash differs); use another checkpoint, or, "
                f"if you changed the file on purpose, take its entry out of {MANIFEST}"
            )
