"""Chunk files against what was recorded of them.

Comes in: a chunk file, its `ChunkRecord`, the dataset's token type and vocabulary. Goes out: nothing, or a
`DatasetError` that names the file and what is wrong. Guarantee: "fast" reads the offsets table and no token; "full"
reads every byte, so one flipped bit anywhere is found. A chunk that is a link is never followed: it could lead out of
the dataset.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pretrainkit.errors import DatasetError
from pretrainkit.formats.litdata import check_name, header_bytes, read_chunk
from pretrainkit.records import ChunkRecord
from pretrainkit.storage import checksum, read_description, write_atomic

VerifyLevel = Literal["fast", "full"]

CHECKSUMS_FILENAME = "checksums.json"


def verify_chunk(path: Path, record: ChunkRecord, dtype: str, vocab_size: int, level: VerifyLevel = "fast") -> None:
    """Check one chunk file against its record.

    Args:
        path: The file.
        record: What was recorded when it was written.
        dtype: Token type of the dataset.
        vocab_size: Largest id allowed, plus one.
        level: "fast": size and offsets table. "full": also the checksum and every id.

    Raises:
        DatasetError: The file is missing, a link, or does not fit its record or the vocabulary.
    """
    check_vocabulary(record, vocab_size, str(path))
    check_table(_read_header(path, record), record, dtype, str(path))
    if level == "full":
        if checksum(path) != record.checksum:
            raise DatasetError(f"{path} has another checksum than its record; it is damaged, make it again")
        tokens, _ = read_chunk(path, dtype)
        largest = int(tokens.max())
        if largest != record.max_token_id:
            raise DatasetError(
                f"{path} has {largest} as its largest id, its record {record.max_token_id}; make it again"
            )


def check_vocabulary(record: ChunkRecord, vocab_size: int, source: str) -> None:
    """Refuse a chunk that holds an id the tokenizer cannot give.

    Raises:
        DatasetError: Names `source` and the id.
    """
    if record.max_token_id >= vocab_size:
        raise DatasetError(
            f"{source} holds the id {record.max_token_id}, beyond the vocabulary of {vocab_size:,}; it is damaged or "
            "was made with another tokenizer"
        )


def check_table(header: bytes, record: ChunkRecord, dtype: str, source: str) -> None:
    """Check a chunk's first bytes, up to the first token, against its record.

    Raises:
        DatasetError: They tell of other items or of another size; names `source`.
    """
    import numpy as np

    itemsize = np.dtype(dtype).itemsize
    begin = header_bytes(record.items)
    table = np.frombuffer(header[: len(header) // 4 * 4], dtype="<u4")
    fits = (
        len(header) == begin
        and table[0] == record.items
        and table[1] == begin
        and table[-1] == record.bytes == begin + record.tokens * itemsize
        and bool((table[2:] >= table[1:-1]).all())
        and not bool(((table[1:] - table[1]) % itemsize).any())
    )
    if not fits:
        raise DatasetError(f"{source} has an offsets table that does not fit its record; it is damaged, make it again")


def _read_header(path: Path, record: ChunkRecord) -> bytes:
    """The bytes before the first token, after a check that this is a plain file of the recorded size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not make us wait
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing though its record names it; fetch it or make it again") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DatasetError(f"{path} is a link, not a chunk; put the file itself there") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{path} is not a regular file; put the chunk itself there")
        if status.st_size != record.bytes:
            raise DatasetError(
                f"{path} has {status.st_size:,} bytes, its record says {record.bytes:,}; it is damaged, make it again"
            )
        return os.pread(descriptor, header_bytes(record.items), 0)
    finally:
        os.close(descriptor)


def write_checksums(folder: str | Path, fingerprint: str, chunks: Sequence[ChunkRecord]) -> None:
    """Write `folder/checksums.json`: what `verify_chunk` needs to know of every chunk of a merged dataset."""
    # No indentation: Python's fast encoder has none, and a large dataset has a hundred thousand chunks.
    rows = [vars(chunk) for chunk in chunks]
    write_atomic(f"{folder}/{CHECKSUMS_FILENAME}", json.dumps({"fingerprint": fingerprint, "chunks": rows}) + "\n")


def read_checksums(folder: str | Path) -> tuple[str, list[ChunkRecord]]:
    """Read `write_checksums` back: the merge's fingerprint and the chunks in order.

    Raises:
        DatasetError: The file is missing or damaged, or names a file outside its folder.
    """
    path = Path(folder) / CHECKSUMS_FILENAME
    try:
        raw = json.loads(read_description(path))
        chunks = [ChunkRecord(**row) for row in raw["chunks"]]
        fingerprint = raw["fingerprint"]
    except FileNotFoundError as error:
        raise DatasetError(f"{folder} has no {CHECKSUMS_FILENAME}; give a folder that merge wrote") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged ({error}); merge again") from error
    for chunk in chunks:
        check_name(chunk.filename, str(path))
        check_numbers(chunk, str(path))
    return str(fingerprint), chunks


def check_numbers(record: ChunkRecord, source: str) -> None:
    """Refuse a record whose numbers cannot be: not whole, negative, or a chunk without tokens.

    Raises:
        DatasetError: Names `source` and the field.
    """
    least: dict[str, int] = {"documents": 0, "items": 1, "tokens": 1, "bytes": 1, "max_token_id": 0}
    for name, lowest in least.items():
        value: Any = getattr(record, name)
        if type(value) is not int or value < lowest:
            raise DatasetError(f"{source}: {record.filename} has {name} {value!r}; it is damaged, make it again")
    if record.documents > record.items:
        raise DatasetError(
            f"{source}: {record.filename} has {record.items} items for {record.documents} documents; it is damaged"
        )
