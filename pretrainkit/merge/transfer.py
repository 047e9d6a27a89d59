"""Chunks into the target folder: linked, moved, copied, or joined from several.

Comes in: verified source chunks and the layout. Goes out: files in the target. Guarantees: a file has its final name
only when it is whole and on the disk; what is copied or joined is checked against its checksum on the way; nothing
but files of this merge is ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pretrainkit.errors import DatasetError, StorageError
from pretrainkit.formats.litdata import chunk_header, read_chunk
from pretrainkit.merge.layout import Output, Part
from pretrainkit.merge.sources import SourceChunk
from pretrainkit.metadata import DatasetInfo
from pretrainkit.records import ChunkRecord
from pretrainkit.storage import checksum, storage_errors
from pretrainkit.verify import VerifyLevel, verify_chunk

if TYPE_CHECKING:
    import numpy as np

MergeMode = Literal["auto", "link", "move", "copy"]

_COPY_BYTES = 4 << 20
# What a file system answers when it cannot link or rename between two places, as opposed to being full or broken.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS}


class Placed(NamedTuple):
    """One chunk of the target, done."""

    record: ChunkRecord
    """What it holds."""
    how: str
    """"kept", "linked", "moved", "copied" or "joined"."""


def find_intact(chunk: SourceChunk, moved_to: Path | None, info: DatasetInfo, level: VerifyLevel) -> Path:
    """Where an intact copy of a source chunk lies: in a node folder, or already in the target.

    Args:
        chunk: The chunk.
        moved_to: Its name in the target, where an interrupted merge may have moved it; None when it has none.
        info: Token type and vocabulary.
        level: How closely to look.

    Raises:
        DatasetError: No copy is intact; tells what is wrong with the first.
    """
    problem: DatasetError | None = None
    paths = [folder / chunk.record.filename for folder in chunk.folders]
    for path in (*paths, *([moved_to] if moved_to is not None else [])):
        try:
            verify_chunk(path, chunk.record, info.token_dtype, info.tokenizer.vocab_size, level)
            return path
        except DatasetError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def renamed(record: ChunkRecord, filename: str) -> ChunkRecord:
    """A chunk's record under the chunk's name in the merged dataset."""
    return dataclasses.replace(record, filename=filename)


def place_whole(source: Path, target: Path, record: ChunkRecord, mode: MergeMode) -> Placed:
    """Bring one source chunk into the target as it is; does nothing when it is there.

    Args:
        source: An intact copy, possibly `target` itself.
        target: Final path.
        record: The source chunk's record.
        mode: "auto" links, else renames, else copies; the others do what they say or fail.

    Raises:
        StorageError: The file system cannot do what `mode` asks for, or the disk is full.
        DatasetError: The bytes changed under our hands.
    """
    placed = renamed(record, target.name)
    try:
        if mode in ("auto", "link"):  # the common case first: one system call and done
            os.link(source, target, follow_symlinks=False)
            return Placed(placed, "linked")
    except OSError as error:
        if error.errno not in _CANNOT_LINK | {errno.EEXIST, errno.ENOSPC, errno.EDQUOT}:
            raise
    with storage_errors(f"write {target}"):
        same_size = target.exists() and target.stat().st_size == record.bytes
        if same_size and (os.path.samefile(source, target) or checksum(target) == record.checksum):
            return Placed(placed, "kept")
        with contextlib.suppress(FileNotFoundError):
            target.unlink()  # damaged, and in a folder that carries our mark
        return Placed(placed, _bring(source, target, record, mode))


def _bring(source: Path, target: Path, record: ChunkRecord, mode: MergeMode) -> str:
    tries: list[tuple[str, Any]] = []
    if mode in ("auto", "link"):
        tries.append(("linked", lambda: os.link(source, target, follow_symlinks=False)))
    if mode in ("auto", "move"):
        tries.append(("moved", lambda: source.rename(target)))
    for how, attempt in tries:
        try:
            attempt()
            return how
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            if mode == "link":
                raise StorageError(
                    f"cannot link {source} to {target} ({error.strerror}); use --mode=auto or --mode=copy"
                ) from error
    _copy(source, target, record)
    if mode == "move":
        source.unlink()
        return "moved"
    return "copied"


def _copy(source: Path, target: Path, record: ChunkRecord) -> None:
    """Copy with the checksum taken on the way."""

    def pieces() -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_COPY_BYTES))
        with open(source, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    if _write(target, pieces(), expected=record.checksum) != record.checksum:
        raise DatasetError(f"{source} has another checksum than its record; it is damaged, make it again")


def place_joined(
    output: Output, chunks: Sequence[SourceChunk], intact: Sequence[Path], target: Path, info: DatasetInfo
) -> Placed:
    """Write one chunk made of parts of several; the same parts give the same bytes.

    Args:
        output: The parts.
        chunks: All source chunks.
        intact: Where an intact copy of each lies.
        target: Final path.
        info: Token type.

    Raises:
        StorageError: The target cannot be written.
        DatasetError: A source's bytes do not fit its checksum.
    """
    import numpy as np

    opened = [open_part(part, chunks[part.chunk].record, intact[part.chunk], info) for part in output.parts]
    starts = np.cumsum([0, *(part.tokens for part in output.parts)])
    ends = np.concatenate([view.ends + start for view, start in zip(opened, starts, strict=False)])
    header = chunk_header(ends, np.dtype(info.token_dtype).itemsize)
    with storage_errors(f"write {target}"):
        digest = _write(target, [memoryview(header), *(view.tokens.data for view in opened)])
    record = ChunkRecord(
        filename=target.name,
        split=info.split,
        documents=sum(view.documents for view in opened),
        items=len(ends),
        tokens=int(starts[-1]),
        bytes=target.stat().st_size,
        checksum=digest,
        max_token_id=max(int(view.tokens.max()) for view in opened),
    )
    return Placed(record, "joined")


class PartView(NamedTuple):
    """The tokens of one part, and what begins and ends in it."""

    tokens: np.ndarray
    """(tokens,) view of the file."""
    ends: np.ndarray
    """(items,) int64 cumulative token ends within the part; the last equals the token count."""
    documents: int
    """Documents that begin in the part."""
    continues: bool
    """Whether its first item is the rest of something that began before."""


def open_part(part: Part, record: ChunkRecord, path: Path, info: DatasetInfo) -> PartView:
    """Read one part of a source chunk, its whole file checked against its checksum.

    Raises:
        DatasetError: The file does not fit its record.
    """
    import numpy as np

    if checksum(path) != record.checksum:
        raise DatasetError(f"{path} has another checksum than its record; it is damaged, make it again")
    tokens, item_ends = read_chunk(path, info.token_dtype)
    begins = np.concatenate([[0], item_ends[:-1]])
    if record.items != record.documents:  # the first item is the rest of a document of the chunk before
        begins = begins[1:]
    inside = item_ends[(item_ends > part.start) & (item_ends < part.stop)]
    documents = int(((begins >= part.start) & (begins < part.stop)).sum())
    return PartView(
        tokens=tokens[part.start : part.stop],
        ends=np.append(inside, part.stop) - part.start,
        documents=documents,
        continues=documents == len(inside),
    )


def _write(target: Path, pieces: Any, expected: str | None = None) -> str:
    """Write pieces to a temporary name, fsync, rename; the checksum of what was written.

    With `expected`, nothing is renamed unless the checksum is that one.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    # One writer per target (the folder is locked), so one fixed name: an interrupted run's rest is written over.
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            for piece in pieces:
                digest.update(piece)
                rest = memoryview(piece).cast("B")
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        if expected in (None, digest.hexdigest()):
            temporary.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return digest.hexdigest()
