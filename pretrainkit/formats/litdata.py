"""LitData's token chunks and index, byte for byte what litdata's own writer makes, without importing litdata.

Comes in: flat token arrays and where their items end. Goes out: `chunk-*.bin` files and one `index.json`, which stock
`litdata.StreamingDataset(..., item_loader=TokensLoader(block_size=...))` reads with no code of ours. Guarantees: the
same arrays give the same bytes; an index that names anything but plain token chunks below its own folder is refused
before a file is opened, so a crafted one runs nothing and reaches nothing.

Layout of a chunk, little-endian: u32 N; u32[N + 1] absolute byte offsets of the items and of the end; the items' raw
token bytes with no header of their own. Source: litdata 0.2.76, streaming/writer.py `_create_chunk`.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrainkit.errors import DatasetError
from pretrainkit.storage import read_description, write_atomic

if TYPE_CHECKING:
    import numpy as np

INDEX_FILENAME = "index.json"

# Offsets are u32, so nothing in a chunk may lie at or beyond this many bytes.
MAX_CHUNK_BYTES = 2**32 - 1

# The only data_spec of a bare tensor. litdata imports whatever module another one names: no other is ever accepted.
DATA_SPEC = '[1, {"type": null, "context": null, "children_spec": []}]'

# Source: litdata 0.2.76, constants.py, _TORCH_DTYPES_MAPPING and _NUMPY_DTYPES_MAPPING; integer types alone.
DTYPE_OF_FORMAT = {
    "no_header_tensor:11": "uint8",
    "no_header_tensor:13": "int16",
    "no_header_tensor:14": "int16",
    "no_header_tensor:15": "int32",
    "no_header_tensor:16": "int32",
    "no_header_tensor:17": "int64",
    "no_header_tensor:18": "int64",
    "no_header_tensor:20": "uint16",
    "no_header_numpy:1": "int16",
    "no_header_numpy:2": "int32",
    "no_header_numpy:3": "int64",
    "no_header_numpy:4": "uint8",
    "no_header_numpy:5": "uint16",
    "no_header_numpy:6": "uint32",
}
FORMAT_OF_DTYPE = {"uint16": "no_header_tensor:20", "int32": "no_header_tensor:16"}

# A plain relative name: no "..", no hidden part, no separator at either end, nothing a shell or a URL would interpret.
_SAFE_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*\.bin", re.ASCII)


@dataclass(frozen=True)
class ChunkEntry:
    """One line of an index."""

    filename: str
    """Name relative to the index's folder."""
    chunk_bytes: int
    """Size of the file, header included."""
    chunk_size: int
    """Items in the chunk: documents, or pieces of one."""
    dim: int
    """Tokens in the chunk."""


def header_bytes(num_items: int) -> int:
    """Bytes before the first token of a chunk with this many items."""
    return 4 * (num_items + 2)


def chunk_header(item_ends: np.ndarray, itemsize: int) -> bytes:
    """What stands before the tokens: the item count and the offsets table.

    Args:
        item_ends: (items,) integers, cumulative token ends, not falling; the last is the token count.
        itemsize: Bytes per token.

    Raises:
        DatasetError: The chunk would not fit into 32-bit offsets.
    """
    import numpy as np

    num_items = len(item_ends)
    begin = header_bytes(num_items)
    size = begin + int(item_ends[-1]) * itemsize
    if size > MAX_CHUNK_BYTES:
        raise DatasetError(f"a chunk of {size:,} bytes is too large for LitData (4 GiB); lower chunk_bytes")
    header = np.empty(num_items + 2, dtype="<u4")
    header[0] = num_items
    header[1] = begin
    # In 64 bits until the sum is known to fit.
    header[2:] = np.asarray(item_ends, dtype=np.int64) * itemsize + begin
    return header.tobytes()


def write_chunk(path: str | Path, tokens: np.ndarray, item_ends: np.ndarray) -> None:
    """Write one chunk file. Neither atomic nor fsynced: the caller publishes it.

    Args:
        path: File to write.
        tokens: (tokens,) uint16 or int32, at least one.
        item_ends: (items,) integers, cumulative token ends, rising; the last equals `len(tokens)`.

    Raises:
        DatasetError: The chunk would not fit into 32-bit offsets.
    """
    import numpy as np

    assert tokens.ndim == 1, tokens.shape
    assert tokens.dtype.name in FORMAT_OF_DTYPE, tokens.dtype
    assert len(item_ends), "a chunk has at least one item"
    assert 0 < int(item_ends[-1]) == len(tokens), (item_ends[-1], len(tokens))
    header = chunk_header(item_ends, tokens.dtype.itemsize)
    with open(path, "wb") as file:
        file.write(header)
        file.write(np.ascontiguousarray(tokens).data)


def read_chunk(path: str | Path, dtype: np.dtype | str) -> tuple[np.ndarray, np.ndarray]:
    """Open one chunk: (tokens,) a read-only view of the file, and (items,) int64 cumulative token ends.

    Args:
        path: Chunk file.
        dtype: Type of a token, from the index.

    Raises:
        DatasetError: The file is missing, or its offsets table does not describe exactly this file.
    """
    import numpy as np

    path, dtype = Path(path), np.dtype(dtype)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would make us wait
            raise DatasetError(f"{path} is not a regular file; put the chunk itself there")
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; make the dataset again or fetch the file") from error
    except ValueError as error:  # mmap refuses an empty file
        raise DatasetError(f"{path} is empty; the dataset is damaged, make it again") from error
    num_items = int(raw[:4].view("<u4")[0]) if len(raw) >= 4 else 0
    begin = header_bytes(num_items)
    if num_items == 0 or begin > len(raw):
        raise DatasetError(f"{path} is no LitData chunk ({len(raw):,} bytes, {num_items:,} items); it is damaged")
    offsets = raw[4:begin].view("<u4").astype(np.int64)
    if offsets[0] != begin or offsets[-1] != len(raw) or (np.diff(offsets) < 0).any():
        raise DatasetError(f"{path} has an offsets table that does not fit its {len(raw):,} bytes; it is damaged")
    starts = offsets - begin
    if (starts % dtype.itemsize).any():
        raise DatasetError(
            f"{path} holds items that are no whole {dtype.name} tokens; it is damaged or of another type"
        )
    return raw[begin:].view(dtype), starts[1:] // dtype.itemsize


def write_index(
    folder: str | Path, entries: Sequence[ChunkEntry], dtype: np.dtype | str, chunk_bytes: int, fingerprint: str = ""
) -> None:
    """Write `folder/index.json` atomically; the same arguments give the same bytes.

    Args:
        folder: Dataset folder, local or a URL.
        entries: The chunks in order.
        dtype: uint16 or int32.
        chunk_bytes: Size chunks were aimed at; information only.
        fingerprint: Anything that differs when the tokens differ, such as a hash of the chunks' checksums.
    """
    import numpy as np

    chunks = [
        {"chunk_bytes": e.chunk_bytes, "chunk_size": e.chunk_size, "dim": e.dim, "filename": e.filename}
        for e in entries
    ]
    config = {
        "chunk_bytes": chunk_bytes,
        "chunk_size": None,
        "compression": None,
        "compression_batch_size": None,
        "compression_level": None,
        "data_format": [FORMAT_OF_DTYPE[np.dtype(dtype).name]],
        "data_spec": DATA_SPEC,
        "encryption": None,
        "ipc_compression": None,
        "item_loader": "TokensLoader",
        "types": "tensor",
    }
    # litdata names the cache folder of a remote dataset after updated_at, so that a dataset replaced at its address is
    # fetched anew. A hash of the contents serves that purpose; a time stamp would differ between equal datasets.
    content = hashlib.sha256(json.dumps([fingerprint, config, chunks], sort_keys=True).encode()).hexdigest()[:32]
    index = {"chunks": chunks, "config": config, "updated_at": content}
    target = f"{folder}/{INDEX_FILENAME}" if isinstance(folder, str) else folder / INDEX_FILENAME
    write_atomic(target, json.dumps(index, sort_keys=True) + "\n")


def read_index(folder: str | Path) -> tuple[list[ChunkEntry], np.dtype]:
    """The chunks of a local token dataset, in order, and the type of its tokens; ours or stock litdata's.

    Raises:
        DatasetError: No index, not JSON, anything but plain integer tokens, or a file name that leaves the folder.
    """
    path = Path(folder) / INDEX_FILENAME
    try:
        text = read_description(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(
            f"{folder} has no {INDEX_FILENAME}: unfinished, or no dataset; give a folder that optimize or merge wrote"
        ) from error
    return parse_index(text, str(path))


def parse_index(text: str, source: str) -> tuple[list[ChunkEntry], np.dtype]:
    """`read_index` of an index's text, for indexes that lie elsewhere; `source` stands in the messages."""
    import numpy as np

    try:
        raw = json.loads(text)
        config, chunks = raw["config"], raw["chunks"]
        dtype = _check_config(config, source)
        entries = [_entry(chunk, source) for chunk in chunks]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f"{source} is no LitData index ({error!r}); the dataset is damaged, make it again"
        ) from error
    names = {entry.filename for entry in entries}
    if len(names) != len(entries):
        raise DatasetError(f"{source} names a chunk twice; its tokens would count double, make the dataset again")
    return entries, np.dtype(dtype)


def _check_config(config: dict[str, Any], source: str) -> str:
    """Name of the token type; refuses compression, encryption, other loaders, other structures than one flat tensor."""
    data_format = config["data_format"]
    if config.get("item_loader", "TokensLoader") != "TokensLoader":
        raise DatasetError(
            f"{source} was written for {config['item_loader']!r}; only TokensLoader datasets hold tokens"
        )
    if not isinstance(data_format, list) or len(data_format) != 1 or data_format[0] not in DTYPE_OF_FORMAT:
        raise DatasetError(f"{source} has the data_format {data_format!r}; only flat integer tokens are read")
    if json.loads(config["data_spec"]) != json.loads(DATA_SPEC):
        raise DatasetError(
            f"{source} has the data_spec {config['data_spec']!r}; only that of a bare tensor is accepted"
        )
    for key in ("compression", "encryption", "ipc_compression"):
        if config.get(key) is not None:
            raise DatasetError(f"{source} has {key} {config[key]!r}; write the dataset without it")
    return DTYPE_OF_FORMAT[data_format[0]]


def _entry(chunk: dict[str, Any], source: str) -> ChunkEntry:
    name = chunk["filename"]
    check_name(name, source)
    numbers = {key: chunk[key] for key in ("chunk_bytes", "chunk_size", "dim")}
    if numbers["dim"] is None:
        raise DatasetError(f"{source}: {name} has no token count; write it with item_loader=TokensLoader()")
    for key, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**40:
            raise DatasetError(f"{source}: {name} has {key} {number!r}; the dataset is damaged, make it again")
    return ChunkEntry(name, **numbers)


def check_name(name: object, source: str) -> None:
    """Refuse a chunk name that is not a plain path below the dataset's own folder.

    Raises:
        DatasetError: Absolute, with `..`, hidden, or of other characters than letters, digits, `_`, `.` and `-`.
    """
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise DatasetError(f"{source} names the file {name!r}, which is no plain chunk name; do not trust this dataset")
