"""Rows as a file gives them -> clean text: valid UTF-8, no nulls, no empty strings; the rest counted and located."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrainkit.arrow import string_buffers
from pretrainkit.documents import DocumentBatch
from pretrainkit.records import Failure


def clean(column: Any, locate: Callable[[int, str, str], Failure], failures: tuple[Failure, ...] = ()) -> DocumentBatch:
    """Clean one run of rows.

    Args:
        column: Arrow array of a string or binary type, possibly with nulls.
        locate: (row in `column`, reason, detail) -> a located failure.
        failures: Rows that the reader has refused already; they are not in `column`, and are counted by their reason.
    """
    import numpy as np
    import pyarrow as pa

    column = _as_strings(column)
    rows = len(column) + len(failures)
    dropped: dict[str, int] = {}
    for failure in failures:
        dropped[failure.reason] = dropped.get(failure.reason, 0) + 1
    try:
        column.validate(full=True)  # Parquet and Arrow only promise that strings are UTF-8; nobody has looked
    except pa.ArrowInvalid:
        column, bad = _without_invalid(column, locate)
        failures += bad
        dropped["bad_row"] = dropped.get("bad_row", 0) + len(bad)
    if column.null_count:
        dropped["null"] = column.null_count
        column = column.drop_null()
    has_text = np.diff(string_buffers(column)[0]) > 0
    if not has_text.all():
        dropped["empty"] = int((~has_text).sum())
        column = column.filter(pa.array(has_text))
    return DocumentBatch(texts=column, rows=rows, dropped=dropped, failures=failures)


def _as_strings(column: Any) -> Any:
    """The column as one `StringArray` or `LargeStringArray`; bytes are looked at as text, without a check."""
    import pyarrow as pa

    types = pa.types
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind):
        return column
    if types.is_binary(kind):
        return column.view(pa.string())
    if types.is_large_binary(kind):
        return column.view(pa.large_string())
    if types.is_null(kind):  # what pandas makes of a column without any text
        return column.cast(pa.string())
    if types.is_fixed_size_binary(kind):
        return column.cast(pa.binary()).view(pa.string())
    # Views: their cast to offsets copies, and checks nothing when it goes by way of binary.
    return column.cast(pa.large_binary()).view(pa.large_string())


def _without_invalid(column: Any, locate: Callable[[int, str, str], Failure]) -> tuple[Any, tuple[Failure, ...]]:
    """The rows that are valid UTF-8, and the others located."""
    import pyarrow as pa

    wide = pa.types.is_large_string(column.type)
    raw = column.view(pa.large_binary() if wide else pa.binary())
    failures: list[Failure] = []
    keep: list[bool] = []
    for row, value in enumerate(raw):
        problem = _utf8_problem(value.as_buffer()) if value.is_valid else None
        keep.append(problem is None)
        if problem is not None:
            failures.append(locate(row, "bad_row", problem))
    return column.filter(pa.array(keep)), tuple(failures)


def _utf8_problem(data: Any) -> str | None:
    try:
        str(memoryview(data), "utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start} ({error.reason})"
    return None
