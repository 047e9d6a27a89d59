"""LitData chunks: our bytes are litdata's bytes, and stock litdata reads them; nothing else is accepted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pretrainkit.errors import DatasetError
from pretrainkit.formats.litdata import ChunkEntry, header_bytes, read_chunk, read_index, write_chunk, write_index

ENDS = np.array([5, 6, 20])


def write_dataset(folder, dtype="uint16", counts=(20,)):
    """A dataset of one chunk per count, tokens 0, 1, 2, ... through all of them, three items per chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, start = [], 0
    for index, count in enumerate(counts):
        tokens = np.arange(start, start + count).astype(dtype)
        path = folder / f"chunk-0-{index}.bin"
        write_chunk(path, tokens, np.array([1, 2, count]))
        entries.append(ChunkEntry(path.name, path.stat().st_size, 3, count))
        start += count
    write_index(folder, entries, dtype, chunk_bytes=1 << 26)
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_chunk_and_index_are_the_bytes_litdata_writes(tmp_path, dtype):
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    (tmp_path / "stock").mkdir()
    writer = BinaryWriter(str(tmp_path / "stock"), chunk_bytes=1 << 26, item_loader=TokensLoader())
    writer._rank = 0
    tokens = np.arange(20).astype(dtype)
    for index, item in enumerate(np.split(tokens, ENDS[:-1])):
        writer.add_item(index, torch.from_numpy(item))
    writer.done()
    writer.merge(1)

    (tmp_path / "ours").mkdir()
    write_chunk(tmp_path / "ours/chunk-0-0.bin", tokens, ENDS)
    size = (tmp_path / "ours/chunk-0-0.bin").stat().st_size
    write_index(tmp_path / "ours", [ChunkEntry("chunk-0-0.bin", size, 3, 20)], dtype, chunk_bytes=1 << 26)

    assert (tmp_path / "ours/chunk-0-0.bin").read_bytes() == (tmp_path / "stock/chunk-0-0.bin").read_bytes()
    ours, stock = (json.loads((tmp_path / side / "index.json").read_text()) for side in ("ours", "stock"))
    assert ours.pop("updated_at") != stock.pop("updated_at")
    assert ours == stock
    assert read_index(tmp_path / "stock") == read_index(tmp_path / "ours")


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_stock_streaming_dataset_reads_the_exact_tokens(tmp_path, dtype):
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    folder = write_dataset(tmp_path / "data", dtype, counts=(20, 13, 8))
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=4), shuffle=False)
    read = [dataset[i].tolist() for i in range(len(dataset))]
    # 13 tokens hold three blocks of four; the thirteenth token, 32, is the chunk's unreachable tail.
    assert read == [list(range(i, i + 4)) for i in (*range(0, 32, 4), 33, 37)]


def test_index_depends_on_contents_alone(tmp_path):
    first, second = write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b")
    assert (first / "index.json").read_bytes() == (second / "index.json").read_bytes()
    entries, dtype = read_index(second)
    write_index(second, entries, dtype, 1 << 26, fingerprint="other tokens")
    assert (first / "index.json").read_bytes() != (second / "index.json").read_bytes()


def test_chunk_comes_back_with_its_item_ends(tmp_path):
    write_chunk(tmp_path / "c.bin", np.arange(20, dtype=np.int32)[::1], ENDS)
    tokens, ends = read_chunk(tmp_path / "c.bin", "int32")
    assert tokens.tolist() == list(range(20))
    assert ends.tolist() == ENDS.tolist()
    assert header_bytes(3) == 20
    assert not tokens.flags.writeable


def test_strided_tokens_are_written_in_order(tmp_path):
    write_chunk(tmp_path / "c.bin", np.arange(10, dtype=np.uint16)[::2], np.array([5]))
    assert read_chunk(tmp_path / "c.bin", "uint16")[0].tolist() == [0, 2, 4, 6, 8]


def damaged_chunks():
    yield "empty", lambda b: b"", "is empty"
    yield "half header", lambda b: b[:10], "is no LitData chunk"
    yield "truncated", lambda b: b[:-2], "offsets table that does not fit"
    yield "longer", lambda b: b + b"xx", "offsets table that does not fit"
    yield "no items", lambda b: bytes(4) + b[4:], "is no LitData chunk"
    yield "huge count", lambda b: b"\xff\xff\xff\xff" + b[4:], "is no LitData chunk"
    yield "falling offsets", lambda b: b[:8] + b[12:16] + b[8:12] + b[16:], "offsets table that does not fit"
    yield "odd offset", lambda b: b[:8] + bytes([b[8] + 1]) + b[9:], "no whole uint16 tokens"


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in damaged_chunks()], ids=[c[0] for c in damaged_chunks()]
)
def test_damaged_chunk_is_named(tmp_path, change, message):
    path = tmp_path / "c.bin"
    write_chunk(path, np.arange(20, dtype=np.uint16), ENDS)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DatasetError, match=message):
        read_chunk(path, "uint16")


def test_missing_chunk_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"c\.bin is missing"):
        read_chunk(tmp_path / "c.bin", "uint16")


def test_chunk_beyond_32_bit_offsets_is_refused(tmp_path):
    from pretrainkit.formats.litdata import chunk_header

    with pytest.raises(DatasetError, match="lower chunk_bytes"):
        chunk_header(np.array([2**30]), 4)
    assert len(chunk_header(np.array([2**30 - 4]), 4)) == 12


BAD_NAMES = [
    "../x.bin",
    "/etc/passwd",
    "/x.bin",
    "a/../../x.bin",
    "a//x.bin",
    ".x.bin",
    "x.txt",
    "",
    "a\\x.bin",
    "x.bin\n",
    7,
    None,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_leaves_the_folder_is_refused(tmp_path, name):
    folder = write_dataset(tmp_path / "data")
    index = json.loads((folder / "index.json").read_text())
    index["chunks"][0]["filename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match="no plain chunk name"):
        read_index(folder)


def test_nested_chunk_names_are_accepted(tmp_path):
    write_index(tmp_path, [ChunkEntry("0/chunk-0-0.bin", 60, 3, 20)], "uint16", 1)
    assert read_index(tmp_path)[0][0].filename == "0/chunk-0-0.bin"


EVIL_SPEC = '[1, {"type": "builtins.dict", "context": "[]", "children_spec": []}]'


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data_spec", EVIL_SPEC, "data_spec"),
        ("data_spec", None, "is no LitData index"),
        ("data_format", ["pickle"], "data_format"),
        ("data_format", ["no_header_tensor:1"], "data_format"),
        ("data_format", ["no_header_tensor:20", "no_header_tensor:20"], "data_format"),
        ("data_format", "no_header_tensor:20", "data_format"),
        ("compression", "zstd", "compression 'zstd'"),
        ("encryption", {"algorithm": "fernet"}, "encryption"),
        ("item_loader", "PyTreeLoader", "PyTreeLoader"),
    ],
)
def test_anything_but_plain_tokens_is_refused(tmp_path, key, value, message):
    folder = write_dataset(tmp_path / "data")
    index = json.loads((folder / "index.json").read_text())
    index["config"][key] = value
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match=message):
        read_index(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"chunks": 3, "config": {}}', "null", '{"chunks": [{}]}', "[" * 100_000]
)
def test_index_of_another_shape_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DatasetError, match="is no LitData index"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("dim", None), ("dim", -1), ("chunk_size", 2.5), ("chunk_bytes", 2**50), ("dim", True)]
)
def test_impossible_counts_are_refused(tmp_path, key, value):
    folder = write_dataset(tmp_path / "data")
    index = json.loads((folder / "index.json").read_text())
    index["chunks"][0][key] = value
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match="no token count" if value is None else key):
        read_index(folder)


def test_chunk_named_twice_is_refused(tmp_path):
    entry = ChunkEntry("chunk-0-0.bin", 60, 3, 20)
    write_index(tmp_path, [entry, entry], "uint16", 1)
    with pytest.raises(DatasetError, match="names a chunk twice"):
        read_index(tmp_path)


def test_folder_without_index_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"has no index\.json: unfinished, or no dataset"):
        read_index(tmp_path)
