"""Parquet shards: footers for planning, row groups streamed page by page for reading."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from pretrainkit.documents import BATCH_BYTES, DocumentBatch, Piece, ShardInfo, blame_file
from pretrainkit.documents.cleaning import clean
from pretrainkit.errors import InputError, PretrainKitError
from pretrainkit.records import Failure, SourceRange
from pretrainkit.storage import ListedFile, is_remote, open_input

# A dictionary-encoded column says how large its distinct values are, not its text: rows bound the batch as well.
_MAX_BATCH_ROWS = 8192
_FINGERPRINT_BYTES = 1 << 16


def inspect(file: ListedFile, text_column: str) -> ShardInfo:
    """Row groups and text bytes of a shard, from its footer."""
    import pyarrow as pa

    try:
        with open_input(file.path) as source:
            fingerprint = fingerprint_of(source)
            parquet = _open(source)
            problem = _column_problem(parquet, text_column)
            if problem is not None:
                return ShardInfo(kind="file", fingerprint=fingerprint, problem=problem)
            pieces = tuple(piece for piece in _pieces(parquet, text_column) if piece.rows)
            return ShardInfo(kind="row_group", fingerprint=fingerprint, pieces=pieces)
    except (OSError, pa.ArrowException, PretrainKitError) as error:
        return ShardInfo(kind="file", fingerprint="", problem=blame_file(error, file.path))


def fingerprint_of(file: Any) -> str:
    """A hash of the end: the footer lies there, holds every offset, size and statistic, and changes with the text."""
    import xxhash

    file.seek(max(0, file.size() - _FINGERPRINT_BYTES))
    return str(xxhash.xxh3_64_hexdigest(file.read(_FINGERPRINT_BYTES)))


def read(path: str, source: SourceRange, text_column: str) -> Iterator[DocumentBatch]:
    """The documents of row groups `source.start` .. `source.stop`, whatever happens to one of them."""
    import pyarrow as pa

    try:
        file = open_input(path)
        parquet = _open(file, prefetch=is_remote(path))
        problem = _column_problem(parquet, text_column)
        if problem is not None:
            raise InputError(problem)
        sizes = [piece.text_bytes for piece in _pieces(parquet, text_column)]
        if source.stop > len(sizes):
            raise InputError(f"has {len(sizes)} row groups, {source.stop} are due")
    except (OSError, pa.ArrowException, PretrainKitError) as error:
        # It could be opened when the plan was made: something happened to it since.
        yield _bad_rows(source, None, None, 1, blame_file(error, path))
        return
    with file:
        for row_group in range(source.start, source.stop):
            yield from _read_row_group(parquet, row_group, sizes[row_group], path, source, text_column)


def _read_row_group(
    parquet: Any, row_group: int, text_bytes: int, path: str, source: SourceRange, text_column: str
) -> Iterator[DocumentBatch]:
    import pyarrow as pa

    num_rows = parquet.metadata.row_group(row_group).num_rows
    batch_rows = min(_MAX_BATCH_ROWS, max(1, BATCH_BYTES * num_rows // max(1, text_bytes)))
    row = 0
    batches = parquet.iter_batches(batch_rows, row_groups=[row_group], columns=[text_column], use_threads=False)
    while row < num_rows:
        try:
            column = next(batches).column(0)
        except (OSError, pa.ArrowException, PretrainKitError, StopIteration) as error:
            yield _bad_rows(source, row_group, row, num_rows - row, blame_file(error, path))
            return
        first = row

        def locate(index: int, reason: str, detail: str, first: int = first) -> Failure:
            return Failure(shard=source.shard, row_group=row_group, row=first + index, reason=reason, detail=detail)

        yield clean(column, locate)
        row += len(column)


def _bad_rows(source: SourceRange, row_group: int | None, row: int | None, num_rows: int, detail: str) -> DocumentBatch:
    import pyarrow as pa

    detail = f"{detail} ({num_rows} rows from here)" if row_group is not None else detail
    failure = Failure(shard=source.shard, row_group=row_group, row=row, reason="bad_file", detail=detail)
    return DocumentBatch(
        texts=pa.array([], pa.string()), rows=num_rows, dropped={"bad_file": num_rows}, failures=(failure,)
    )


def _open(source: Any, *, prefetch: bool = False) -> Any:
    import pyarrow.parquet as pq

    # buffer_size makes Arrow read a column chunk in pieces instead of whole; pre_buffer, for remote files, fetches the
    # ranges ahead. page_checksum_verification finds pages that changed since they were written, where there is a CRC.
    try:
        return pq.ParquetFile(
            source, page_checksum_verification=True, pre_buffer=prefetch, buffer_size=0 if prefetch else 1 << 20
        )
    except UnicodeDecodeError as error:
        raise InputError(f"its footer names a column that is not UTF-8: {error.object!r}") from error


class _NothingRead(Exception):  # noqa: N818 - no error: the footer is as it should be
    """Arrow has accepted a footer and asks for the first byte of data."""


class _FooterAlone(io.RawIOBase):
    """Stands for a file of any size whose data is not to be read."""

    def __init__(self) -> None:
        self._position = 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: 1 << 62}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:  # noqa: ARG002 - the interface of files
        raise _NothingRead


def _check_footer(parquet: Any, text_column: str) -> None:
    """Let Arrow look at the text column's entry in every row group, where its exceptions are caught.

    RowGroupMetaData.column() looks at the same, but an exception there ends the process: size statistics that do not
    fit the schema, or an encrypted column in a plain footer. Source: pyarrow 26, _parquet.pxd, no `except +`.

    Raises:
        OSError: An entry contradicts the schema, or cannot be decrypted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # With pre_buffer, Arrow first asks every row group where its columns lie.
    footer = pq.ParquetFile(pa.PythonFile(_FooterAlone(), mode="r"), metadata=parquet.metadata, pre_buffer=True)
    with contextlib.suppress(_NothingRead, StopIteration):  # no row groups, no data
        next(footer.iter_batches(1, row_groups=range(footer.num_row_groups), columns=[text_column], use_threads=False))


def _column_problem(parquet: Any, text_column: str) -> str | None:
    """Why a file's text column cannot be used, or None."""
    import pyarrow as pa

    schema = parquet.schema_arrow
    indices = schema.get_all_field_indices(text_column)
    if not indices:
        return f"has no column {text_column!r}; it has {', '.join(schema.names) or 'none'} (--text_column)"
    if len(indices) > 1:
        return f"has {len(indices)} columns named {text_column!r}; which one is meant cannot be said"
    kind = schema.field(indices[0]).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
             types.is_binary_view, types.is_fixed_size_binary, types.is_null)  # fmt: skip
    if not any(test(kind) for test in tests):
        return f"column {text_column!r} holds {kind}, not text (--text_column)"
    if len(_leaves(parquet, text_column)) > 1:  # pyarrow would read both
        return f"has a column {text_column!r} and another with such a field inside; rename one of them"
    return None


def _leaves(parquet: Any, text_column: str) -> list[int]:
    """Numbers of the columns, as they are stored, that a name selects."""
    schema = parquet.metadata.schema
    names = [schema.column(index).path for index in range(parquet.metadata.num_columns)]
    return [index for index, name in enumerate(names) if name == text_column or name.startswith(f"{text_column}.")]


def _pieces(parquet: Any, text_column: str) -> list[Piece]:
    """One piece per row group.

    Raises:
        InputError: The footer contradicts itself: nobody can say how many rows there are.
        OSError: The footer contradicts itself, or the column is encrypted.
    """
    _check_footer(parquet, text_column)
    metadata = parquet.metadata
    leaves = _leaves(parquet, text_column)
    pieces = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        column = group.column(leaves[0])
        if column.num_values != group.num_rows or group.num_rows < 0:
            raise InputError(
                f"its footer says {group.num_rows} rows, but {column.num_values} values of {text_column!r}, for row "
                f"group {index}"
            )
        size = max(0, column.total_uncompressed_size)
        pieces.append(Piece(start=index, stop=index + 1, text_bytes=size, rows=group.num_rows))
    rows = sum(piece.rows or 0 for piece in pieces)
    if rows != metadata.num_rows:
        raise InputError(f"its footer says {metadata.num_rows} rows, but {rows} in its row groups")
    return pieces
