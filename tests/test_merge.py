"""Merging: the same bytes whatever the nodes, every chunk checked, nothing but whole datasets visible."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pretrainkit import merge_datasets
from pretrainkit.errors import DatasetError, StorageError
from pretrainkit.formats.litdata import ChunkEntry, read_chunk, read_index, write_chunk, write_index
from pretrainkit.merge.layout import Part, lay_out
from pretrainkit.metadata import DatasetInfo, TokenizerInfo
from pretrainkit.records import ChunkRecord, SplitCounts, UnitRecord, chunk_name, length_histogram, record_name
from pretrainkit.storage import checksum

EOS = 59_999
PLAN = "a" * 64
TOKENIZER_JSON = b'{"model": {"vocab": {}}}'
TOKENIZER = TokenizerInfo(
    name="tiny", sha256=hashlib.sha256(TOKENIZER_JSON).hexdigest(), vocab_size=60_000, bos_id=None, eos_id=EOS
)
LENGTHS = [3, 5, 2, 7, 4, 1, 9, 6]  # of documents, EOS not counted


@dataclasses.dataclass
class Unit:
    """One unit's documents as tokens, in chunks as optimize cuts them."""

    number: int
    chunks: list[list[np.ndarray]]  # items of each chunk
    documents: list[int]  # that begin in each chunk
    lengths: list[int]  # of the unit's documents


def make_units(count: int, block_size: int | None = None, chunk_tokens: int = 24) -> list[Unit]:
    """Units whose tokens count up through the whole dataset, so that order, loss and doubling are visible."""
    units, counter, lengths = [], itertools.count(), itertools.cycle(LENGTHS)
    for number in range(count):
        documents = [np.array([next(counter) for _ in range(next(lengths))] + [EOS], "uint16") for _ in range(4)]
        if block_size is None:
            halves = [documents[:2], documents[2:]]
            units.append(Unit(number, halves, [2, 2], [len(d) for d in documents]))
            continue
        stream, ends = np.concatenate(documents), np.cumsum([len(d) for d in documents])
        begins = [0, *ends[:-1]]
        size = chunk_tokens // block_size * block_size
        cuts = [*range(0, len(stream) // block_size * block_size, size), len(stream) // block_size * block_size]
        cuts = sorted({*cuts, len(stream)})
        chunks, starting = [], []
        for start, stop in itertools.pairwise(cuts):
            inner = [e - start for e in ends if start < e < stop]
            chunks.append(np.split(stream[start:stop], inner))
            starting.append(int(sum(start <= b < stop for b in begins)))
        units.append(Unit(number, chunks, starting, [len(d) for d in documents]))
    return units


def write_nodes(root: Path, units: Sequence[Unit], nodes: dict[str, Sequence[int]], **changes) -> Path:
    """Node folders as optimize leaves them: `nodes` says which node made which units."""
    info = DatasetInfo(
        split="train",
        tokenizer=changes.pop("tokenizer", TOKENIZER),
        token_dtype="uint16",
        boundary="eos",
        plans=[PLAN],
        units_planned=len(units),
        settings={"chunk_bytes": 64},
        versions={"tokenizers": "1"},
    )
    info = dataclasses.replace(info, **changes)
    for node, numbers in nodes.items():
        folder = root / node
        (folder / "units").mkdir(parents=True)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/tokenizer.json").write_bytes(TOKENIZER_JSON)
        entries = [entry for number in numbers for entry in write_unit(folder, units[number], len(units))]
        (folder / "metadata.json").write_text(info.to_json())
        write_index(folder, entries, "uint16", 64)
    return root


def write_unit(folder: Path, unit: Unit, planned: int) -> list[ChunkEntry]:
    records = []
    for index, (items, documents) in enumerate(zip(unit.chunks, unit.documents, strict=True)):
        path = folder / chunk_name(unit.number, index)
        tokens = np.concatenate(items)
        write_chunk(path, tokens, np.cumsum([len(item) for item in items]))
        records.append(
            ChunkRecord(
                filename=path.name,
                split="train",
                documents=documents,
                items=len(items),
                tokens=len(tokens),
                bytes=path.stat().st_size,
                checksum=checksum(path),
                max_token_id=int(tokens.max()),
            )
        )
    counts = SplitCounts(
        documents=len(unit.lengths),
        tokens=sum(unit.lengths),
        text_bytes=10 * len(unit.lengths),
        document_lengths=length_histogram(unit.lengths),
    )
    record = UnitRecord(
        plan=PLAN,
        unit=unit.number,
        units_planned=planned,
        split="train",
        documents_in=len(unit.lengths) + 1,
        dropped={"empty": 1},
        splits={"train": counts, "val": SplitCounts()},
        chunks=tuple(records),
        source=(),
        engine="tokenizers",
    )
    (folder / record_name(unit.number)).write_text(record.to_json())
    return [ChunkEntry(r.filename, r.bytes, r.items, r.tokens) for r in records]


def all_tokens(folder: Path) -> list[int]:
    entries, dtype = read_index(folder)
    return [int(t) for e in entries for t in read_chunk(folder / e.filename, dtype)[0]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, whose text names a process while it is held."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def stream_of(units: Sequence[Unit]) -> list[int]:
    return [int(t) for unit in units for chunk in unit.chunks for item in chunk for t in item]


def edit_record(folder: Path, unit: int, change) -> None:
    path = folder / record_name(unit)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


SPREADS = [
    {"n1": [0, 1, 2, 3, 4, 5]},
    {"n1": [1, 4], "n2": [0, 5], "n3": [2, 3]},
    {"z": [0, 1, 2], "a": [3, 4, 5]},
    {"n1": [0, 1, 2, 3], "n2": [2, 3, 4, 5]},  # two units made twice
]


@pytest.mark.parametrize("block_size", [None, 4])
def test_result_is_the_same_bytes_however_the_units_were_spread(tmp_path, block_size):
    units = make_units(6, block_size)
    results = []
    for index, spread in enumerate(SPREADS):
        source = write_nodes(tmp_path / f"source{index}", units, spread, block_size=block_size)
        merge_datasets(source, tmp_path / f"target{index}")
        results.append(contents(tmp_path / f"target{index}"))
    assert all(result == results[0] for result in results)
    assert "index.json" in results[0]


def test_tokens_come_in_the_order_of_the_plan(tmp_path):
    units = make_units(6)
    info = merge_datasets(write_nodes(tmp_path / "s", units, SPREADS[1]), tmp_path / "t")
    assert all_tokens(tmp_path / "t") == stream_of(units)
    assert (info.documents, info.tokens, info.units, info.tail_tokens) == (24, len(stream_of(units)), 6, 0)
    assert (info.documents_in, info.dropped, info.text_bytes) == (30, {"empty": 6}, 240)
    assert sum(info.document_lengths.values()) == 24
    assert DatasetInfo.load(tmp_path / "t") == info


def test_small_chunks_are_joined_and_large_ones_linked(tmp_path):
    units = make_units(6)
    source = write_nodes(tmp_path / "s", units, SPREADS[0], settings={"chunk_bytes": 16})
    merge_datasets(source, tmp_path / "linked")
    assert os.path.samefile(tmp_path / "linked/chunk-0-0.bin", source / "n1/chunk-0-0.bin")
    assert len(read_index(tmp_path / "linked")[0]) == 12

    source = write_nodes(tmp_path / "s2", units, SPREADS[0], settings={"chunk_bytes": 1 << 20})
    info = merge_datasets(source, tmp_path / "joined")
    assert info.chunks == 1
    assert all_tokens(tmp_path / "joined") == stream_of(units)
    entry = read_index(tmp_path / "joined")[0][0]
    _, ends = read_chunk(tmp_path / "joined/chunk-0-0.bin", "uint16")
    assert entry.chunk_size == 24 == len(ends)
    assert np.diff(ends, prepend=0).tolist() == [length for unit in units for length in unit.lengths]


def test_with_a_block_size_only_less_than_one_block_is_left_out_and_counted(tmp_path):
    units = make_units(5, block_size=4)
    total = sum(length for unit in units for length in unit.lengths)
    info = merge_datasets(write_nodes(tmp_path / "s", units, {"n": range(5)}, block_size=4), tmp_path / "t")
    assert total % 4, "the case must have a tail"
    assert (info.tokens, info.tail_tokens) == (total - total % 4, total % 4)
    assert all(entry.dim % 4 == 0 for entry in read_index(tmp_path / "t")[0])
    merged = all_tokens(tmp_path / "t")
    counted = [t for t in merged if t != EOS]
    assert len(counted) == len(set(counted)), "no token twice"
    assert set(merged) <= set(stream_of(units))
    assert merge_datasets(tmp_path / "s", tmp_path / "t") == info, "and is found complete when run again"


def test_documents_wholly_in_the_tail_are_counted_as_dropped(tmp_path):
    # One unit of 4 + 2 + 2 tokens and blocks of 5: the tail of three holds the last document and a part of another.
    documents = [np.array([1, 2, 3, EOS], "uint16"), np.array([4, EOS], "uint16"), np.array([5, EOS], "uint16")]
    unit = Unit(0, [[documents[0], documents[1][:1]], [documents[1][1:], documents[2]]], [2, 1], [4, 2, 2])
    info = merge_datasets(write_nodes(tmp_path / "s", [unit], {"n": [0]}, block_size=5), tmp_path / "t")
    assert all_tokens(tmp_path / "t") == [1, 2, 3, EOS, 4]
    assert (info.documents, info.tail_tokens, info.dropped) == (2, 3, {"empty": 1, "tail": 1})
    assert info.document_lengths == {"2^1": 1, "2^2": 1}
    assert info.documents_in == info.documents + sum(info.dropped.values())


@pytest.mark.parametrize("block_size", [4, 7])
def test_stock_litdata_streams_the_merged_tokens(tmp_path, block_size):
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    units = make_units(6, block_size)
    merge_datasets(write_nodes(tmp_path / "s", units, SPREADS[1], block_size=block_size), tmp_path / "t")
    dataset = StreamingDataset(str(tmp_path / "t"), item_loader=TokensLoader(block_size=block_size), shuffle=False)
    read = [int(t) for i in range(len(dataset)) for t in dataset[i]]
    assert read == all_tokens(tmp_path / "t")
    assert len(read) > len(stream_of(units)) - block_size


@pytest.mark.parametrize("mode", ["auto", "link", "move", "copy"])
def test_modes_give_the_same_bytes(tmp_path, mode):
    units = make_units(6)
    source = write_nodes(tmp_path / "s", units, SPREADS[1], settings={"chunk_bytes": 16})
    expected = merge_datasets(source, tmp_path / "expected", mode="copy")
    info = merge_datasets(source, tmp_path / "t", mode=mode)
    assert info == expected
    assert contents(tmp_path / "t") == contents(tmp_path / "expected")
    assert (source / "n1/chunk-1-0.bin").exists() == (mode != "move")


def test_a_finished_merge_is_left_alone_even_when_its_sources_were_moved(tmp_path, caplog):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[1])
    first = merge_datasets(source, tmp_path / "t", mode="move")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*")}
    caplog.set_level("INFO")
    assert merge_datasets(source, tmp_path / "t", mode="move") == first
    assert "is complete already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*")} == before


@pytest.mark.parametrize("mode", ["auto", "move", "copy"])
def test_interrupted_anywhere_and_run_again_gives_the_same_bytes(tmp_path, mode, monkeypatch):
    """Dies at the first, second, ... call that changes the disk, until one run gets through."""
    units = make_units(4, block_size=4)
    merge_datasets(write_nodes(tmp_path / "s0", units, {"a": [0, 3], "b": [1, 2]}, block_size=4), tmp_path / "t0")
    source = write_nodes(tmp_path / "s", units, {"a": [0, 3], "b": [1, 2]}, block_size=4)
    target, expected = tmp_path / "t", contents(tmp_path / "t0")

    class Killed(BaseException):
        pass

    countdown = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("link", "replace", "rename", "fsync", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    for steps in itertools.count(1):
        countdown = steps
        try:
            merge_datasets(source, target, mode=mode)
            break
        except Killed:
            if (target / "index.json").exists():  # died after the last write: then everything else is there
                assert contents(target) == expected
    countdown = 0
    assert steps > 10
    assert contents(target) == expected


def test_a_damaged_finished_dataset_is_mended(tmp_path):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[1])
    merge_datasets(source, tmp_path / "t", mode="copy")
    expected = contents(tmp_path / "t")
    (tmp_path / "t/chunk-0-0.bin").write_bytes(b"short")
    merge_datasets(source, tmp_path / "t", mode="copy")
    assert contents(tmp_path / "t") == expected


def test_source_may_be_one_node_folder(tmp_path):
    units = make_units(6)
    source = write_nodes(tmp_path / "s", units, {"only": range(6)})
    merge_datasets(source, tmp_path / "a")
    merge_datasets(source / "only", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_intact_copy_of_a_unit_made_twice_is_taken(tmp_path):
    units = make_units(6)
    source = write_nodes(tmp_path / "s", units, SPREADS[3])
    (source / "n1/chunk-2-0.bin").write_bytes(b"")
    merge_datasets(source, tmp_path / "t")
    assert all_tokens(tmp_path / "t") == stream_of(units)


def test_merge_without_index_in_a_node_folder_relies_on_its_records(tmp_path):
    units = make_units(6)
    source = write_nodes(tmp_path / "s", units, SPREADS[1])
    (source / "n1/index.json").unlink()
    merge_datasets(source, tmp_path / "t")
    assert all_tokens(tmp_path / "t") == stream_of(units)


# What may be wrong with the sources, and what is said.


@pytest.fixture
def source(tmp_path):
    return write_nodes(tmp_path / "s", make_units(6), SPREADS[1])


def refused(source: Path, message: str, **flags) -> None:
    target = source.parent / "target"
    with pytest.raises(DatasetError, match=message):
        merge_datasets(source, target, **flags)
    assert not target.exists(), "nothing half-written"


def test_missing_units_and_the_unfinished_node_are_named(source):
    (source / "n2/units/00000005.json").unlink()
    (source / "n2/index.json").unlink()
    refused(source, r"1 of the plan's 6 units is missing \(unit 5\); unfinished: n2")


def test_missing_node_folder_is_noticed(source):
    shutil.rmtree(source / "n3")
    refused(source, r"2 of the plan's 6 units are missing \(unit 2, 3\); found n1, n2")


def test_no_unit_at_all_is_noticed(source):
    for path in source.glob("*/units/*"):
        path.unlink()
    for path in source.glob("*/index.json"):
        path.unlink()
    refused(source, r"6 of the plan's 6 units are missing \(unit 0, 1, 2, 3, 4, \.\.\.\)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundary": "bos"}, "its boundary is 'bos', not 'eos'"),
        ({"token_dtype": "int32"}, "its token_dtype is 'int32'"),
        ({"block_size": 8}, "its block_size is 8, not None"),
        ({"tokenizer": dataclasses.replace(TOKENIZER, sha256="0")}, "its tokenizer sha256 is '0'"),
        ({"tokenizer": dataclasses.replace(TOKENIZER, vocab_size=9)}, "its tokenizer vocab_size is 9"),
        ({"tokenizer": dataclasses.replace(TOKENIZER, eos_id=9)}, "its tokenizer eos_id is 9"),
    ],
)
def test_folders_that_do_not_belong_together_are_refused(source, changes, message):
    info = DatasetInfo.load(source / "n3")
    (source / "n3/metadata.json").write_text(dataclasses.replace(info, **changes).to_json())
    refused(source, f"n3 does not belong to .*n1: {message}")


def test_tokenizer_under_another_name_is_the_same(source, tmp_path):
    info = DatasetInfo.load(source / "n3")
    renamed = dataclasses.replace(info, tokenizer=dataclasses.replace(TOKENIZER, name="a-copy"))
    (source / "n3/metadata.json").write_text(renamed.to_json())
    assert merge_datasets(source, tmp_path / "t").tokenizer.name == "a-copy"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_truncated_chunk_is_named(source):
    path = source / "n1/chunk-1-0.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(source, r"chunk-1-0\.bin has \d+ bytes, its record says \d+")


def test_missing_chunk_is_named(source):
    (source / "n1/chunk-1-0.bin").unlink()
    refused(source, r"chunk-1-0\.bin is missing")


def test_damaged_offsets_are_found_by_the_fast_check(source):
    flip(source / "n1/chunk-1-0.bin", 9)
    refused(source, r"chunk-1-0\.bin has an offsets table that does not fit")


def test_flipped_bit_is_found_by_the_full_check(tmp_path):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[1], settings={"chunk_bytes": 16})
    flip(source / "n1/chunk-1-0.bin", -1)
    refused(source, r"chunk-1-0\.bin has another checksum", verify="full")


@pytest.mark.parametrize("settings", [{"chunk_bytes": 16}, {"chunk_bytes": 1 << 20}], ids=["copied", "joined"])
def test_flipped_bit_is_found_wherever_bytes_are_read_anyway(tmp_path, settings):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[1], settings=settings)
    flip(source / "n1/chunk-1-0.bin", -1)
    with pytest.raises(DatasetError, match=r"chunk-1-0\.bin has another checksum"):
        merge_datasets(source, tmp_path / "t", mode="copy")
    assert not (tmp_path / "t/index.json").exists()


def test_id_beyond_the_vocabulary_is_refused(source):
    for node in ("n1", "n2", "n3"):
        info = DatasetInfo.load(source / node)
        small = dataclasses.replace(info, tokenizer=dataclasses.replace(TOKENIZER, vocab_size=100))
        (source / node / "metadata.json").write_text(small.to_json())
    refused(source, r"holds the id 59999, beyond the vocabulary of 100")


def test_record_that_hides_a_large_id_is_found_by_the_full_check(tmp_path):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[1], settings={"chunk_bytes": 16})
    edit_record(source / "n1", 1, lambda raw: raw["chunks"][0].update(max_token_id=5))
    refused(source, r"has 59999 as its largest id, its record 5", verify="full")


def test_unit_made_twice_with_different_results_is_refused(tmp_path):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[3])
    edit_record(source / "n2", 2, lambda raw: raw["chunks"][0].update(checksum="0" * 32))
    refused(source, r"unit 2 in .*n2 differs from the one in .*n1")


def test_unit_made_twice_by_two_engines_is_one_when_the_bytes_are(tmp_path):
    source = write_nodes(tmp_path / "s", make_units(6), SPREADS[3])
    edit_record(source / "n2", 2, lambda raw: raw.update(engine="gigatoken"))
    assert merge_datasets(source, tmp_path / "t").units == 6


@pytest.mark.parametrize("name", ["../chunk-1-0.bin", "/etc/passwd", "a/../../b.bin", "chunk-1-0.bin\n"])
def test_record_that_leads_out_of_its_folder_is_refused(source, name):
    edit_record(source / "n1", 1, lambda raw: raw["chunks"][0].update(filename=name))
    refused(source, "names the chunk")


@pytest.mark.parametrize("name", ["../chunk-1-0.bin", "/etc/passwd"])
def test_index_that_leads_out_of_its_folder_is_refused(source, name):
    index = json.loads((source / "n1/index.json").read_text())
    index["chunks"][0]["filename"] = name
    (source / "n1/index.json").write_text(json.dumps(index))
    refused(source, "no plain chunk name")


def test_index_with_a_foreign_data_spec_is_refused(source):
    index = json.loads((source / "n1/index.json").read_text())
    index["config"]["data_spec"] = '[1, {"type": "os.system", "context": null, "children_spec": []}]'
    (source / "n1/index.json").write_text(json.dumps(index))
    refused(source, "data_spec")


def test_index_that_disagrees_with_the_records_is_refused(source):
    entries, dtype = read_index(source / "n1")
    write_index(source / "n1", [*entries, dataclasses.replace(entries[0], filename="chunk-9-9.bin")], dtype, 64)
    refused(source, r"disagree on chunk-9-9\.bin")


def test_chunk_that_is_a_link_is_refused(source, tmp_path):
    path = source / "n1/chunk-1-0.bin"
    shutil.move(path, tmp_path / "elsewhere.bin")
    path.symlink_to(tmp_path / "elsewhere.bin")
    refused(source, r"chunk-1-0\.bin is a link")


def test_chunk_that_is_a_pipe_is_refused(source):
    (source / "n1/chunk-1-0.bin").unlink()
    os.mkfifo(source / "n1/chunk-1-0.bin")
    refused(source, "is not a regular file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(unit=-1), "impossible number"),
        (lambda raw: raw.update(unit=6), "impossible number"),
        (lambda raw: raw.update(documents_in="5"), "impossible number"),
        (lambda raw: raw["splits"]["train"].update(text_bytes="9"), "impossible number"),
        (lambda raw: raw["chunks"][0].update(tokens=0), "has tokens 0"),
        (lambda raw: raw["chunks"][0].update(bytes=1.5), r"has bytes 1\.5"),
        (lambda raw: raw["chunks"][0].update(items=9), "9 items for 2 documents"),
        (lambda raw: raw.update(documents_in=99), "does not account for all"),
        (lambda raw: raw["splits"]["train"].update(tokens=1), "does not account for all"),
        (lambda raw: raw.update(split="val"), "belongs to another split"),
        (lambda raw: raw.update(plan="b" * 64), r"1 of the plan's 6 units is missing \(unit 4\)"),
        (lambda raw: raw.update(units_planned=7), "others say"),
        (lambda raw: raw.update(dropped=[1]), "is no unit record"),
        (lambda raw: raw.update(plan=[1]), "is no unit record"),
        (lambda raw: raw["chunks"][0].update(checksum=None), "is no unit record"),
        (lambda raw: raw["splits"]["train"].update(document_lengths={"2^-1": 4}), "is no unit record"),
        (lambda raw: raw["splits"]["train"].update(document_lengths={"2^1": 5}), "does not account for all"),
    ],
)
def test_impossible_record_is_refused(source, change, message):
    (source / "n1/index.json").unlink()
    edit_record(source / "n1", 4, change)
    refused(source, message)


def test_a_plan_of_absurd_length_is_answered_at_once(source):
    for path in source.glob("*/units/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "units_planned": 10**12}))
    refused(
        source, r"999,999,999,994 of the plan's 1,000,000,000,000 units are missing \(unit 6, 7, 8, 9, 10, \.\.\.\)"
    )


def put_folder(path):
    path.unlink()
    path.mkdir()


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


def put_loop(path):
    path.unlink()
    path.symlink_to(path)


NO_TEXT = {
    "binary": (lambda path: path.write_bytes(b"\xff\x00"), "is not text; it is damaged"),
    "deep": (lambda path: path.write_text("[" * 100_000), "is no unit record|is no LitData index|is not JSON"),
    "list": (lambda path: path.write_text("[]"), "is no unit record|is no LitData index|holds no dataset description"),
}
NO_FILE = {"folder": put_folder, "pipe": put_pipe, "loop": put_loop}


@pytest.mark.parametrize("name", ["units/00000004.json", "index.json", "metadata.json"])
@pytest.mark.parametrize(("damage", "message"), NO_TEXT.values(), ids=NO_TEXT.keys())
def test_a_description_that_is_none_is_named(source, name, damage, message):
    damage(source / "n1" / name)
    refused(source, message)


@pytest.mark.parametrize("damage", NO_FILE.values(), ids=NO_FILE.keys())
def test_a_record_that_is_no_file_is_named(source, damage):
    damage(source / "n1/units/00000004.json")
    refused(source, "00000004.json is not a regular file")


def test_an_index_that_is_a_pipe_is_named(source):
    put_pipe(source / "n1/index.json")
    refused(source, "index.json is not a regular file")


def test_folder_without_metadata_is_known_by_its_plan(source, tmp_path):
    (source / "n2/metadata.json").unlink()
    merge_datasets(source, tmp_path / "t")
    assert all_tokens(tmp_path / "t") == stream_of(make_units(6))


def test_node_that_died_before_its_first_unit_is_passed_over(source, tmp_path):
    (source / "a-node" / "units").mkdir(parents=True)
    merge_datasets(source, tmp_path / "t")
    assert all_tokens(tmp_path / "t") == stream_of(make_units(6))


def test_folders_without_any_metadata_are_named(source):
    for path in source.glob("*/metadata.json"):
        path.unlink()
    refused(source, r"n1 has no metadata\.json: its node did not finish")


def test_folder_without_records_is_named(source):
    shutil.rmtree(source / "n2/units")
    refused(source, r"n2 has no units/ with unit records")


def test_folder_above_the_splits_is_answered_with_the_right_one(source):
    refused(source.parent, r"merge its splits one by one: --source_dir=.*/s$")


def test_folder_that_is_no_source_is_named(tmp_path):
    with pytest.raises(DatasetError, match="is not a folder"):
        merge_datasets(tmp_path / "nothing", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no node folder"):
        merge_datasets(tmp_path / "empty", tmp_path / "t")


def test_foreign_tokenizer_beside_the_data_is_refused(source, tmp_path):
    for node in ("n1", "n2", "n3"):
        (source / node / "tokenizer/tokenizer.json").write_bytes(b"{}")
    with pytest.raises(DatasetError, match="holds the tokenizer tiny that made them"):
        merge_datasets(source, tmp_path / "t")
    assert not (tmp_path / "t/index.json").exists()


# What may be wrong with the target.


def test_target_with_other_data_is_not_touched(source, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/precious.txt").write_text("x")
    with pytest.raises(StorageError, match=r"holds other data \(precious\.txt\)"):
        merge_datasets(source, tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["precious.txt"]


def test_target_with_another_dataset_is_not_touched(source, tmp_path):
    merge_datasets(write_nodes(tmp_path / "other", make_units(2), {"n": [0, 1]}), tmp_path / "t")
    before = contents(tmp_path / "t")
    with pytest.raises(StorageError, match="holds another merge, of other sources"):
        merge_datasets(source, tmp_path / "t")
    assert contents(tmp_path / "t") == before


def test_foreign_file_in_an_unfinished_target_is_not_touched(source, tmp_path):
    merge_datasets(source, tmp_path / "t")
    (tmp_path / "t/index.json").unlink()
    (tmp_path / "t/precious.txt").write_text("x")
    with pytest.raises(StorageError, match=r"holds precious\.txt, which is no part"):
        merge_datasets(source, tmp_path / "t")
    assert (tmp_path / "t/precious.txt").read_text() == "x"


def test_draft_of_the_very_first_file_does_not_count_as_other_data(source, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/..merging.x2btzzeb.tmp").write_text("half")
    merge_datasets(source, tmp_path / "t")
    assert not list((tmp_path / "t").glob("*.tmp"))


def test_source_and_target_in_each_other_are_refused(source):
    for target in (source, source / "merged", source.parent):
        with pytest.raises(DatasetError, match="lie in each other"):
            merge_datasets(source, target)


def test_target_in_use_is_refused(source, tmp_path):
    from pretrainkit.locks import folder_lock

    with folder_lock(tmp_path / "t", "merge"), pytest.raises(StorageError, match="in use by another process"):
        merge_datasets(source, tmp_path / "t")


def test_link_across_file_systems_says_what_to_use(source, tmp_path, monkeypatch):
    import errno

    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    units = make_units(6)
    big = write_nodes(tmp_path / "big", units, SPREADS[0], settings={"chunk_bytes": 16})
    with pytest.raises(StorageError, match="use --mode=auto or --mode=copy"):
        merge_datasets(big, tmp_path / "linked", mode="link")
    monkeypatch.setattr(Path, "rename", refuse)
    merge_datasets(big, tmp_path / "copied")
    assert all_tokens(tmp_path / "copied") == stream_of(units)
    assert (big / "n1/chunk-0-0.bin").exists()


# The layout alone.


@pytest.mark.parametrize("block_size", [None, 3, 8])
@pytest.mark.parametrize("chunk_bytes", [8, 40, 1000])
def test_layout_takes_every_token_once(block_size, chunk_bytes):
    tokens = [1, 24, 7, 3, 3, 100, 16, 5, 5, 5, 5, 2, 48]
    outputs, tail = lay_out(tokens, itemsize=2, block_size=block_size, chunk_bytes=chunk_bytes)
    taken = [(p.chunk, t) for o in outputs for p in o.parts for t in range(p.start, p.stop)]
    left = [(p.chunk, t) for p in tail for t in range(p.start, p.stop)]
    assert sorted(taken + left) == [(c, t) for c, count in enumerate(tokens) for t in range(count)]
    assert len(left) < (block_size or 1)
    assert [o.filename for o in outputs] == [f"chunk-0-{i}.bin" for i in range(len(outputs))]
    for output in outputs:
        assert sum(p.tokens for p in output.parts) % (block_size or 1) == 0
        assert output.whole == (output.parts == (Part(output.parts[0].chunk, 0, tokens[output.parts[0].chunk]),))
    if block_size is None:
        assert taken == sorted(taken), "without blocks the order is exact"


def test_layout_does_not_change_when_nothing_needs_joining():
    outputs, tail = lay_out([64, 64, 64], itemsize=2, block_size=8, chunk_bytes=128)
    assert [o.whole for o in outputs] == [True, True, True]
    assert tail == []


@pytest.mark.slow
def test_a_thousand_sources_of_a_hundred_chunks_take_seconds(tmp_path):
    import time

    documents = [[np.array([1, EOS], "uint16")] for _ in range(100)]
    source = write_nodes(tmp_path / "s", [Unit(0, documents, [1] * 100, [2] * 100)], {"n0": [0]})
    text, index = ((source / "n0" / name).read_text() for name in (record_name(0), "index.json"))
    info = DatasetInfo.load(source / "n0")
    metadata = dataclasses.replace(info, units_planned=1000, settings={"chunk_bytes": 16}).to_json()
    for number in range(1000):  # the same bytes under other names are quick to make
        folder = source / f"n{number}"
        (folder / "units").mkdir(parents=True, exist_ok=True)
        for chunk in range(100 if number else 0):
            os.link(source / f"n0/chunk-0-{chunk}.bin", folder / f"chunk-{number}-{chunk}.bin")
        record = json.loads(text.replace("chunk-0-", f"chunk-{number}-"))
        (folder / record_name(number)).write_text(json.dumps({**record, "unit": number, "units_planned": 1000}))
        (folder / "index.json").write_text(index.replace("chunk-0-", f"chunk-{number}-"))
        (folder / "metadata.json").write_text(metadata)
    start = time.monotonic()
    info = merge_datasets(source, tmp_path / "t")
    assert (info.chunks, info.documents) == (100_000, 100_000)
    assert time.monotonic() - start < 60  # 12 s on two busy cores; the bound allows for slow disks
