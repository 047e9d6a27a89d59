"""Shards -> documents: Parquet and JSON Lines, read in bounded batches, every bad piece located.

Comes in: a shard and a range of it (row groups or bytes). Goes out: batches of clean text as Arrow string arrays, with
a count of what was dropped and where. Guarantees: a batch's text is valid UTF-8 without nulls or empty strings; rows
read = texts + dropped; no Python object per document unless something is wrong with it; memory is bounded by a batch,
whatever the size of the file.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrainkit.arrow import concat
from pretrainkit.errors import InputError, PretrainKitError, UnreachableError
from pretrainkit.records import Failure, SourceRange, add_counts
from pretrainkit.statistics import counted
from pretrainkit.storage import ListedFile, open_input

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
}

# Text per batch: large enough that fixed costs vanish, small enough that text and ids stay near the processor's caches.
BATCH_BYTES = 4 << 20

# What the machine or a network drive says when it cannot read now, whatever the file.
_NOT_THE_FILES_FAULT = {
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

OnBadInput = Literal["fail", "skip"]


class UntrustedShardError(Exception):
    """A shard turned out damaged after text was read from it that may be garbled: nothing of it may be used."""

    def __init__(self, shard: str, problem: str) -> None:
        super().__init__(problem)
        self.shard = shard


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The smallest range a shard can be cut into."""

    start: int
    """First row group or byte."""
    stop: int
    """One past the last."""
    text_bytes: int
    """Estimated bytes of text in it, uncompressed."""
    rows: int | None
    """Rows in it, where the file says so."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What planning learns of a shard without reading its text."""

    kind: Literal["row_group", "byte", "file"]
    """What pieces count; "file" when the shard cannot be used."""
    fingerprint: str
    """Changes when the file changes."""
    pieces: tuple[Piece, ...] = ()
    """Its pieces in order."""
    problem: str | None = None
    """Why the shard cannot be used at all, or None."""


@dataclass(frozen=True, kw_only=True)
class DocumentBatch:
    """A run of rows of one shard, cleaned."""

    texts: Any
    """`pyarrow.StringArray` or `LargeStringArray`: valid UTF-8, no nulls, no empty strings, in row order."""
    rows: int
    """Rows read; len(texts) + sum(dropped.values())."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason (metadata.DROP_REASONS)."""
    failures: tuple[Failure, ...] = ()
    """Where bad input stood; empty and null texts are counted in `dropped` alone."""


def shard_format(name: str) -> str:
    """The format by the end of a file's name: "parquet" or "jsonl"."""
    return next(kind for suffix, kind in SUFFIXES.items() if name.lower().endswith(suffix))


def inspect_shard(file: ListedFile, text_column: str) -> ShardInfo:
    """What a shard consists of, from its footer or its size; a shard that cannot be used is described, not raised."""
    if file.problem is not None:
        return ShardInfo(kind="file", fingerprint="", problem=file.problem)
    from pretrainkit.documents import jsonl, parquet

    module = parquet if shard_format(file.name) == "parquet" else jsonl
    info: ShardInfo = module.inspect(file, text_column)
    return info


def read_range(
    path: str, source: SourceRange, text_column: str, fingerprint: str | None = None
) -> Iterator[DocumentBatch]:
    """The documents of one range of a shard, in order.

    Args:
        path: Where to open the shard.
        source: Which part of it; `source.shard` names it in failures.
        text_column: Column that holds the text.
        fingerprint: What `inspect_shard` found; None does not look.

    Raises:
        InputError: The shard is another one than was inspected.
        UntrustedShardError: What was read of the shard cannot be trusted.
    """
    from pretrainkit.documents import jsonl, parquet

    module = parquet if shard_format(source.shard) == "parquet" else jsonl
    if fingerprint is not None:
        _refuse_changed(path, source.shard, fingerprint, module.fingerprint_of)
    batches: Iterator[DocumentBatch] = module.read(path, source, text_column)
    return batches


def _refuse_changed(path: str, shard: str, fingerprint: str, fingerprint_of: Callable[[Any], str]) -> None:
    import pyarrow as pa

    try:
        with open_input(path) as file:
            now: str | None = fingerprint_of(file)
    except FileNotFoundError:
        now = None
    except (OSError, pa.ArrowException, PretrainKitError) as error:
        blame_file(error, path)
        return  # the reader will locate it
    if now != fingerprint:
        raise InputError(
            f"{shard} {'is gone' if now is None else 'has changed'} since the job began; bring the old file back and "
            "run the same command again, or begin anew with another output_dir"
        )


def blame_file(error: Exception, path: str) -> str:
    """An error met while a file was read, in words, where the file is at fault.

    Raises:
        UnreachableError: It is not: to count its rows as bad would drop good text because of a bad moment.
    """
    if isinstance(error, UnreachableError):
        raise error
    if isinstance(error, OSError) and error.errno in _NOT_THE_FILES_FAULT:
        raise UnreachableError(
            f"cannot read {path}: {error.strerror or error}; run the same command again when it can be read, finished "
            "work is kept"
        ) from error
    return " ".join(str(error).split()) or f"ends before its last row ({type(error).__name__})"


def unusable(source: SourceRange, problem: str) -> DocumentBatch:
    """A batch that stands for a shard nothing can be read from; one row, for its rows cannot be counted."""
    import pyarrow as pa

    failure = Failure(shard=source.shard, row_group=None, row=None, reason="bad_file", detail=problem)
    return DocumentBatch(texts=pa.array([], pa.string()), rows=1, dropped={"bad_file": 1}, failures=(failure,))


def refuse_all_bad(problems: list[tuple[str, str]]) -> InputError:
    """The error for shards that cannot be used: names the first few and says how to go on without them."""
    shown = "; ".join(f"{name}: {problem.rstrip('.')}" for name, problem in problems[:5])
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return InputError(
        f"{counted(len(problems), 'input file')} cannot be used: {shown}{more}. --on_bad_input=skip goes on without"
    )


def joined(batches: Iterable[DocumentBatch]) -> Iterator[DocumentBatch]:
    """Batches of at least BATCH_BYTES, but for the last: each has fixed costs, and row groups may be small."""
    waiting: list[DocumentBatch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.texts.nbytes
        if size >= BATCH_BYTES:
            yield _join(waiting)
            waiting, size = [], 0
    if waiting:
        yield _join(waiting)


def _join(batches: list[DocumentBatch]) -> DocumentBatch:
    return DocumentBatch(
        texts=concat([batch.texts for batch in batches]),
        rows=sum(batch.rows for batch in batches),
        dropped=add_counts([batch.dropped for batch in batches]),
        failures=tuple(failure for batch in batches for failure in batch.failures),
    )
