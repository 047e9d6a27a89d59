"""Arrow string arrays as NumPy buffers and back, with no Python object per string.

pyarrow's own conversions from lists load pandas where it is installed, and its compute functions a module of their own:
half a second in every worker for what a few lines of NumPy do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def string_buffers(strings: Any) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Offsets (strings + 1,) and characters of an Arrow (large) string or binary array; characters are not copied."""
    import numpy as np
    import pyarrow as pa

    wide = pa.types.is_large_string(strings.type) or pa.types.is_large_binary(strings.type)
    _, offsets_buffer, data = strings.buffers()
    if offsets_buffer is None:  # an empty array may come without
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64 if wide else np.int32)
    offsets = offsets[strings.offset : strings.offset + len(strings) + 1]
    if data is None:  # nothing but empty strings
        return np.zeros(len(strings) + 1, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    characters = np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]]
    return offsets.astype(np.int64) - int(offsets[0]), characters


def string_array(strings: Sequence[str]) -> Any:
    """A `pyarrow.LargeStringArray` of Python strings.

    Raises:
        UnicodeEncodeError: A string holds a lone surrogate.
    """
    import numpy as np
    import pyarrow as pa

    encoded = [string.encode() for string in strings]
    offsets = np.fromiter(itertools.accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def concat(arrays: Sequence[Any]) -> Any:
    """String arrays, small and large, one after the other."""
    import pyarrow as pa

    if len(arrays) == 1:
        return arrays[0]
    if len({array.type for array in arrays}) > 1:
        arrays = [array.cast(pa.large_string()) for array in arrays]
    return pa.concat_arrays(arrays)
