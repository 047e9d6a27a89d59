"""JSON Lines shards, plain or compressed: plain ones cut into byte ranges, read in blocks of whole lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from pretrainkit.documents import BATCH_BYTES, DocumentBatch, Piece, ShardInfo, UntrustedShardError, blame_file
from pretrainkit.documents.cleaning import clean
from pretrainkit.errors import InputError, PretrainKitError
from pretrainkit.records import Failure, SourceRange
from pretrainkit.storage import ListedFile, open_input

# Source: Arrow, cpp/src/arrow/io/compressed.cc.
_CUT_SHORT = "Truncated compressed stream"
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_FINGERPRINT_BYTES = 1 << 16
_PIECE_BYTES = 4 << 20
# Where a compressed file is damaged, as much of it is lost as is read at a time.
_READ_BYTES = 1 << 16
# A first line longer than this is not looked at before the work begins.
_FIRST_LINE_BYTES = 1 << 20
# A line is held in memory whole.
_LONGEST_LINE_BYTES = 256 << 20
# A request to a store far away costs as much as some megabytes; Arrow would decompress in steps of 64 KB.
_REMOTE_READ_BYTES = 8 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Typical for text; compressed files do not say how large they are inside.
_ASSUMED_COMPRESSION_RATIO = 4


def inspect(file: ListedFile, text_column: str) -> ShardInfo:
    """Byte ranges of a shard; a compressed one is one piece, for it cannot be entered in the middle."""
    import pyarrow as pa

    try:
        with open_input(file.path) as source:
            fingerprint = fingerprint_of(source)
        problem = _first_lines_problem(file.path, text_column)
    except (OSError, pa.ArrowException, PretrainKitError) as error:
        return ShardInfo(kind="file", fingerprint="", problem=blame_file(error, file.path))
    if problem is not None:
        return ShardInfo(kind="file", fingerprint=fingerprint, problem=problem)
    if _compression(file.path) is not None:
        size = file.size * _ASSUMED_COMPRESSION_RATIO
        pieces = [Piece(start=0, stop=0, text_bytes=size, rows=None)] if file.size else []
    else:
        bounds = [*range(0, file.size, _PIECE_BYTES), file.size]
        pieces = [Piece(start=a, stop=b, text_bytes=b - a, rows=None) for a, b in itertools.pairwise(bounds)]
    return ShardInfo(kind="byte", fingerprint=fingerprint, pieces=tuple(pieces))


def fingerprint_of(file: Any) -> str:
    """A hash of the beginning and the end."""
    import xxhash

    digest = xxhash.xxh3_64(file.read(_FINGERPRINT_BYTES))
    file.seek(max(0, file.size() - _FINGERPRINT_BYTES))
    digest.update(file.read(_FINGERPRINT_BYTES))
    return str(digest.hexdigest())


def read(path: str, source: SourceRange, text_column: str) -> Iterator[DocumentBatch]:
    """The documents of the lines that begin in bytes `source.start` .. `source.stop`; of all lines when stop is 0."""
    import pyarrow as pa

    position = source.start
    try:
        for position, block in _blocks(path, source.start, source.stop):
            yield _parse(block, position, source, text_column)
            position += len(block)  # noqa: PLW2901 - where an error leaves off
    except (OSError, pa.ArrowException, PretrainKitError) as error:
        detail = f"{blame_file(error, path)} (after byte {position} of the text)"
        if _compression(path) is not None and not isinstance(error, PretrainKitError) and _CUT_SHORT not in detail:
            # The checksum comes at the end: where the damage lies, and what it garbled, cannot be said.
            raise UntrustedShardError(source.shard, f"{detail}; nothing of it is used") from error
        failure = Failure(shard=source.shard, row_group=None, row=None, reason="bad_file", detail=detail)
        yield DocumentBatch(texts=pa.array([], pa.string()), rows=1, dropped={"bad_file": 1}, failures=(failure,))


def _compression(path: str) -> str | None:
    return next((kind for suffix, kind in _COMPRESSION.items() if path.lower().endswith(suffix)), None)


def _open(path: str, read_ahead: int) -> Any:
    import pyarrow as pa

    compression = _compression(path)
    file = open_input(path, read_ahead=read_ahead)
    return file if compression is None else pa.CompressedInputStream(file, compression)


def _blocks(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(position, whole lines) of about BATCH_BYTES each; a longer line makes a longer block."""
    with _open(path, _REMOTE_READ_BYTES) as opened:
        file = _Reader(opened)
        position, rest = start, b""
        if start > 0:  # the line that begins before belongs to the range before
            opened.seek(start - 1)
            position, rest = _skip_line(file, start - 1, stop)
        while stop == 0 or position < stop:
            block, rest = _whole_lines(file, rest, position)
            if stop and position + len(block) > stop:  # only the lines that begin before stop
                block = block[: block.find(b"\n", stop - position - 1) + 1 or len(block)]
            if block:
                yield position, block
            position += len(block)
            if file.error is not None:
                raise file.error
            if not block:
                return


class _Reader:
    """A file that seems to end where it cannot be read any further; `error` says why."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        import pyarrow as pa

        try:
            return bytes(self._file.read(size))
        except (OSError, pa.ArrowException) as error:
            self.error = error
            return b""


def _whole_lines(file: _Reader, rest: bytes, position: int) -> tuple[bytes, bytes]:
    """Lines of at least BATCH_BYTES in all, or what is left of the file, and the beginning of the next line.

    Raises:
        InputError: There is no end to a line.
    """
    parts, size, has_newline = [rest], len(rest), b"\n" in rest
    while size < BATCH_BYTES or not has_newline:
        data = file.read(_READ_BYTES)
        if not data:
            whole = b"".join(parts)
            # What comes last is a line, unless it was cut short.
            return (whole if file.error is None else whole[: whole.rfind(b"\n") + 1]), b""
        parts.append(data)
        size += len(data)
        has_newline = has_newline or b"\n" in data
        if not has_newline and size > _LONGEST_LINE_BYTES:
            raise InputError(
                f"the line at byte {position} is longer than {_LONGEST_LINE_BYTES:,} bytes: is it JSON Lines?"
            )
    block = b"".join(parts)
    cut = block.rfind(b"\n") + 1
    return block[:cut], block[cut:]


def _skip_line(file: _Reader, position: int, stop: int) -> tuple[int, bytes]:
    """Where the next line begins, or a place beyond `stop`, and what was read of it."""
    while position < stop and (data := file.read(_READ_BYTES)):
        end = data.find(b"\n")
        if end >= 0:
            return position + end + 1, data[end + 1 :]
        position += len(data)
    return max(position, stop), b""


def _parse(block: bytes, position: int, source: SourceRange, text_column: str) -> DocumentBatch:
    """One block of whole lines, by Arrow's parser; line by line where that finds something wrong."""
    import pyarrow as pa
    import pyarrow.json

    def locate(index: int, reason: str, detail: str) -> Failure:
        detail = f"{detail} (row {index} of the lines from byte {position})"
        return Failure(shard=source.shard, row_group=None, row=None, reason=reason, detail=detail)

    if position == 0:
        block = block.removeprefix(_BYTE_ORDER_MARK)
    if not block.strip():
        return DocumentBatch(texts=pa.array([], pa.string()), rows=0)
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(text_column, pa.string())]), unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowException:
        return _parse_lines(block, position, source, text_column)
    column = table.column(0)
    return clean(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks(), locate)


def _parse_lines(block: bytes, position: int, source: SourceRange, text_column: str) -> DocumentBatch:
    """The slow way, for a block with something wrong in it: every line by itself."""
    import pyarrow as pa

    texts: list[bytes | None] = []
    failures: list[Failure] = []
    starts: list[int] = []
    for line in block.split(b"\n"):
        if line.strip():
            try:
                value = _text_of(line, text_column)
                texts.append(value)
                starts.append(position)
            except ValueError as error:
                reason = "not_text" if isinstance(error, _NotTextError) else "bad_row"
                detail = f"{' '.join(str(error).split())} (line at byte {position})"
                failures.append(Failure(shard=source.shard, row_group=None, row=None, reason=reason, detail=detail))
        position += len(line) + 1

    def locate(index: int, reason: str, detail: str) -> Failure:
        detail = f"{detail} (line at byte {starts[index]})"
        return Failure(shard=source.shard, row_group=None, row=None, reason=reason, detail=detail)

    return clean(pa.array(texts, pa.large_binary()), locate, tuple(failures))


class _NotTextError(ValueError):
    """The text column holds something else."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as often as they stand there."""


def _text_of(line: bytes, text_column: str) -> bytes | None:
    try:
        # Bytes that are no UTF-8 are the affair of the key they stand under.
        row = json.loads(line.decode(errors="surrogateescape"), object_pairs_hook=_Pairs)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, _Pairs):
        raise ValueError(f"a {type(row).__name__}, not an object")  # noqa: TRY004 - one bad row, like a syntax error
    values = [value for key, value in row if key == text_column]
    if len(values) > 1:
        raise ValueError(f"has {len(values)} keys {text_column!r}")
    if not values or values[0] is None:
        return None
    (value,) = values
    if not isinstance(value, str):
        kind = "object" if isinstance(value, _Pairs) else type(value).__name__
        raise _NotTextError(f"{text_column!r} holds {kind}, not text")
    return value.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError


def _first_lines_problem(path: str, text_column: str) -> str | None:
    """Why the text column cannot be found, by the first lines; None when one has it, or when all are broken."""
    data = b""
    with _open(path, _FINGERPRINT_BYTES) as file:
        while b"\n" not in data and len(data) < _FIRST_LINE_BYTES and (more := file.read(_READ_BYTES)):
            data += more
    keys: list[str] | None = None
    for line in data.removeprefix(_BYTE_ORDER_MARK).split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # reading will locate it, or it is cut here
        if isinstance(row, dict) and text_column in row:
            return None
        if isinstance(row, dict) and keys is None:
            keys = list(row)
    if keys is None:
        return None
    return f"has no key {text_column!r}; its first line has {', '.join(keys) or 'none'} (--text_column)"
