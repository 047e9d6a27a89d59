"""The whole of optimize, in this process: right tokens, accounted for, the same bytes again."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrainkit.arguments import load_yaml, parse
from pretrainkit.errors import ConfigError, InputError, StorageError
from pretrainkit.formats.litdata import read_chunk, read_index
from pretrainkit.merge import merge_datasets
from pretrainkit.metadata import DatasetInfo
from pretrainkit.optimize import optimize_dataset
from pretrainkit.records import load_records
from pretrainkit.tokenizers import ENGINES, EncodedDocuments
from tests.conftest import BOS, EOS, make_texts, write_parquet

ROOT = Path(__file__).parent.parent


def run(input_dir, tokenizer_dir, output_dir, **flags):
    flags = {"num_workers": 0, "engine": "tokenizers", "unit_bytes": 60_000, **flags}
    return optimize_dataset(tokenizer_dir, output_dir, input_dir, **flags)


def documents_of(output_dir, split="train"):
    """Every document on disk as a list of ids, in unit order, read through the index."""
    (folder,) = sorted((output_dir / split).iterdir())
    entries, dtype = read_index(folder)
    documents = []
    for entry in entries:
        tokens, ends = read_chunk(folder / entry.filename, dtype)
        assert len(tokens) == entry.dim
        assert len(ends) == entry.chunk_size
        documents += [part.tolist() for part in np.split(np.asarray(tokens), ends[:-1])]
    return documents


def expected_ids(texts, tokenizer_dir):
    """What Hugging Face tokenizers say, without special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def read_texts(folder):
    """All texts in the order of sorted paths."""
    files = sorted(folder.rglob("*.parquet"), key=lambda path: path.relative_to(folder).as_posix())
    return [text for path in files for text in pq.read_table(path)["text"].to_pylist()]


def all_bytes(folder):
    """Relative path -> contents of everything below a folder but locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def marker_ids(tokenizer_dir):
    info = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    return {token["content"]: token["id"] for token in info["added_tokens"]}


def test_tokens_are_those_of_tokenizers_in_the_order_of_the_sorted_shards(
    parquet_dir, tokenizer_dir, tmp_path, marker_ids
):
    summary = run(parquet_dir, tokenizer_dir, tmp_path / "out", engine="auto")
    expected = [[*ids, marker_ids[EOS]] for ids in expected_ids(read_texts(parquet_dir), tokenizer_dir)]
    assert documents_of(tmp_path / "out") == expected
    assert summary.engine == "gigatoken"
    assert summary.units > 5
    assert summary.documents_in == 500
    assert summary.documents == {"train": 500}
    assert summary.tokens == {"train": sum(map(len, expected))}


@pytest.mark.parametrize(("boundary", "before", "after"), [("bos", [BOS], []), ("both", [BOS], [EOS])])
def test_each_document_has_exactly_its_boundary_markers(
    parquet_dir, tokenizer_dir, tmp_path, marker_ids, boundary, before, after
):
    run(parquet_dir, tokenizer_dir, tmp_path / "out", boundary=boundary)
    expected = [
        [marker_ids[name] for name in before] + ids + [marker_ids[name] for name in after]
        for ids in expected_ids(read_texts(parquet_dir), tokenizer_dir)
    ]
    assert documents_of(tmp_path / "out") == expected


@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_text_that_names_a_special_token_forges_no_boundary(tokenizer_dir, tmp_path, marker_ids, engine):
    write_parquet(tmp_path / "in" / "a.parquet", [f"one {EOS} two{BOS}{EOS}", EOS, f" {BOS} "])
    run(tmp_path / "in", tokenizer_dir, tmp_path / "out", engine=engine)
    tokens = [token for document in documents_of(tmp_path / "out") for token in document]
    assert tokens.count(marker_ids[EOS]) == 3
    assert tokens.count(marker_ids[BOS]) == 0


def test_chunks_hold_whole_blocks_and_the_same_tokens_where_a_block_size_is_given(parquet_dir, tokenizer_dir, tmp_path):
    run(parquet_dir, tokenizer_dir, tmp_path / "plain")
    run(parquet_dir, tokenizer_dir, tmp_path / "blocks", block_size=65, chunk_bytes=2048)
    (folder,) = (tmp_path / "blocks/train").iterdir()
    for record in load_records(folder):
        assert all(chunk.tokens % 65 == 0 for chunk in record.chunks[:-1])
        assert record.chunks[-1].tokens % 65 == 0 or record.chunks[-1].tokens < 65, "merge links all but small rests"
        assert all(chunk.tokens <= 1024 for chunk in record.chunks)
        assert sum(chunk.documents for chunk in record.chunks) == record.splits["train"].documents
    plain, blocks = (list(itertools.chain(*documents_of(tmp_path / name))) for name in ("plain", "blocks"))
    assert plain == blocks


def test_small_chunks_hold_whole_documents_where_no_block_size_is_given(parquet_dir, tokenizer_dir, tmp_path):
    run(parquet_dir, tokenizer_dir, tmp_path / "large")
    run(parquet_dir, tokenizer_dir, tmp_path / "small", chunk_bytes=2048)
    (folder,) = (tmp_path / "small/train").iterdir()
    assert all(c.tokens <= 1024 or c.items == 1 for record in load_records(folder) for c in record.chunks)
    assert documents_of(tmp_path / "large") == documents_of(tmp_path / "small")


def test_metadata_accounts_for_every_document_and_names_what_made_it(parquet_dir, tokenizer_dir, tmp_path):
    summary = run(parquet_dir, tokenizer_dir, tmp_path / "out", val_fraction=0.2)
    infos = {}
    for split in ("train", "val"):
        (folder,) = (tmp_path / "out" / split).iterdir()
        info = infos[split] = DatasetInfo.load(folder)
        assert info.documents == summary.documents[split] == sum(info.document_lengths.values())
        assert info.tokens == summary.tokens[split]
        assert info.units == info.units_planned == summary.units
        assert (info.tokenizer.vocab_size, info.token_dtype, info.boundary) == (512, "uint16", "eos")
        assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()
        assert info.max_token_id == max(max(document) for document in documents_of(tmp_path / "out", split))
    assert infos["train"].documents + infos["val"].documents == infos["train"].documents_in == 500
    assert infos["train"].text_bytes + infos["val"].text_bytes == sum(
        len(text.encode()) for text in read_texts(parquet_dir)
    )


def test_validation_documents_are_the_same_however_the_input_is_cut(parquet_dir, tokenizer_dir, tmp_path):
    run(parquet_dir, tokenizer_dir, tmp_path / "a", val_fraction=0.1)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(parquet_dir.rglob("*.parquet"))])
    (tmp_path / "one").mkdir()
    pq.write_table(table, tmp_path / "one" / "all.parquet")
    run(tmp_path / "one", tokenizer_dir, tmp_path / "b", val_fraction=0.1, unit_bytes=None)
    for split, low, high in (("val", 25, 75), ("train", 425, 475)):
        a, b = documents_of(tmp_path / "a", split), documents_of(tmp_path / "b", split)
        assert low < len(a) < high
        assert a == b


def test_explicit_validation_files_are_the_validation_split(parquet_dir, tokenizer_dir, tmp_path):
    by_glob = run(parquet_dir, tokenizer_dir, tmp_path / "glob", val_glob="nested/*")
    assert by_glob.documents == {"train": 300, "val": 200}
    write_parquet(tmp_path / "validation" / "v.parquet", make_texts(30, seed=9))
    by_folder = run(parquet_dir, tokenizer_dir, tmp_path / "folder", val_dir=str(tmp_path / "validation"))
    assert by_folder.documents == {"train": 500, "val": 30}
    assert [d[:-1] for d in documents_of(tmp_path / "folder", "val")] == expected_ids(
        make_texts(30, seed=9), tokenizer_dir
    )


def test_a_validation_file_that_is_also_trained_on_is_refused(parquet_dir, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(parquet_dir)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/v.parquet").symlink_to(parquet_dir / "a.parquet")
    for val_dir in (".", parquet_dir, tmp_path / "links"):
        with pytest.raises(InputError, match=r"a\.parquet would be in both splits"):
            run(".", tokenizer_dir, tmp_path / "out", val_dir=val_dir)
    write_parquet(tmp_path / "in" / "a.parquet", make_texts(3))
    (tmp_path / "in" / "val-a.parquet").symlink_to("a.parquet")
    with pytest.raises(InputError, match=r"in/a\.parquet would be in both splits"):
        run(tmp_path / "in", tokenizer_dir, tmp_path / "out", val_glob="val-*")


def test_finished_work_is_not_done_again(parquet_dir, tokenizer_dir, tmp_path):
    first = run(parquet_dir, tokenizer_dir, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}
    second = run(parquet_dir, tokenizer_dir, tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}
    assert after == before
    assert (first.tokens, first.documents, first.units) == (second.tokens, second.documents, second.units)


def test_an_interrupted_job_goes_on_and_ends_in_the_same_bytes(parquet_dir, tokenizer_dir, tmp_path):
    run(parquet_dir, tokenizer_dir, tmp_path / "whole", val_fraction=0.1)
    run(parquet_dir, tokenizer_dir, tmp_path / "out", val_fraction=0.1)
    (train,), (val,) = (tmp_path / "out/train").iterdir(), (tmp_path / "out/val").iterdir()
    # As after kills at various moments: no record, a torn one, no validation record, a chunk cut short.
    (train / "units/00000000.json").unlink()
    (train / "units/00000001.json").write_text("{")
    (val / "units/00000002.json").unlink()
    (train / "chunk-3-0.bin").write_bytes(b"short")
    (train / "index.json").unlink()
    assert run(parquet_dir, tokenizer_dir, tmp_path / "out", val_fraction=0.1).units > 4
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_an_output_made_with_other_settings_is_refused_with_what_changed(parquet_dir, tokenizer_dir, tmp_path):
    run(parquet_dir, tokenizer_dir, tmp_path / "out")
    before = all_bytes(tmp_path / "out")
    with pytest.raises(StorageError, match=r"val_fraction was 0\.0, is 0\.5"):
        run(parquet_dir, tokenizer_dir, tmp_path / "out", val_fraction=0.5)
    assert all_bytes(tmp_path / "out") == before


def test_inputs_that_changed_since_are_named(tokenizer_dir, tmp_path):
    for name in "abc":
        write_parquet(tmp_path / "in" / f"{name}.parquet", make_texts(20, seed=ord(name)))
    run(tmp_path / "in", tokenizer_dir, tmp_path / "out")
    write_parquet(tmp_path / "in" / "b.parquet", make_texts(20, seed=0))
    (tmp_path / "in" / "c.parquet").unlink()
    with pytest.raises(StorageError, match=r"1 input file removed: c\.parquet; 1 input file changed: b\.parquet"):
        run(tmp_path / "in", tokenizer_dir, tmp_path / "out")


def test_an_output_that_holds_other_data_is_left_alone(parquet_dir, tokenizer_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"already holds other data \(thesis.txt\)"):
        run(parquet_dir, tokenizer_dir, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_second_driver_on_one_output_is_refused(parquet_dir, tokenizer_dir, tmp_path):
    from pretrainkit.locks import folder_lock

    with folder_lock(tmp_path / "out", "optimize"), pytest.raises(StorageError, match="is in use by another process"):
        run(parquet_dir, tokenizer_dir, tmp_path / "out")


def test_a_dry_run_says_what_there_is_and_writes_nothing(parquet_dir, tokenizer_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    exact = run(parquet_dir, tokenizer_dir, tmp_path / "out")
    run(parquet_dir, tokenizer_dir, tmp_path / "dry", dry_run=True)
    assert not (tmp_path / "dry").exists()
    assert "files: 3," in caplog.text
    assert "rows: 500" in caplog.text
    words = caplog.text.split("tokens: about ")[1].split()
    estimate, error = (int(word.replace(",", "")) for word in (words[0], words[2]))
    # Parquet counts a few bytes more than the text has.
    assert abs(estimate - exact.tokens["train"]) < 2 * error + 0.1 * estimate


def test_flags_that_contradict_each_other_are_refused(parquet_dir, tokenizer_dir, tmp_path):
    with pytest.raises(ConfigError, match="either --input_dir"):
        run(None, tokenizer_dir, tmp_path / "out")
    with pytest.raises(ConfigError, match="two splits; give one"):
        run(parquet_dir, tokenizer_dir, tmp_path / "out", val_fraction=0.1, val_glob="b*")
    with pytest.raises(ConfigError, match=r"val_fraction=1\.5 is not a share"):
        run(parquet_dir, tokenizer_dir, tmp_path / "out", val_fraction=1.5)
    with pytest.raises(ConfigError, match=r"unknown tokenizer engine 'giga'; did you mean gigatoken\?"):
        run(parquet_dir, tokenizer_dir, tmp_path / "out", engine="giga")
    with pytest.raises(InputError, match=r"does not exist; did you mean .*/parquet"):
        run(parquet_dir.parent / (parquet_dir.name + "x"), tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_path_is_refused_and_a_tilde_is_the_home_folder(parquet_dir, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").symlink_to(parquet_dir)
    (tmp_path / "tokenizer").symlink_to(tokenizer_dir)
    for paths in (["", "tokenizer", "out"], ["in", "", "out"], ["in", "tokenizer", ""]):
        with pytest.raises(ConfigError, match=r"_dir is empty; give a folder or URL \(is a shell variable unset\?\)"):
            run(*paths)
    run("~/in", "~/tokenizer", "~/out")
    with pytest.raises(ConfigError, match="target_dir is empty"):
        merge_datasets("out/train", "")
    merge_datasets("~/out/train", f"file://{tmp_path}/data")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "tokenizer", "out", "data"}


def test_a_place_where_no_folder_can_be_made_is_named(parquet_dir, tokenizer_dir):
    for path, why in (("/proc/out", "is gone or cannot be made"), ("/tmp/" + "x" * 300, "is too long")):
        with pytest.raises(StorageError, match=why):
            run(parquet_dir, tokenizer_dir, path)


def test_a_folder_without_shards_is_refused(tokenizer_dir, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"has no file ending in \.parquet, \.jsonl"):
        run(tmp_path / "in", tokenizer_dir, tmp_path / "out")


class WrongOnElephants:
    """An engine that is right on everything but one word."""

    name = "gigatoken"

    def __init__(self, tokenizer_dir):
        from pretrainkit.tokenizers.huggingface import HuggingFaceEngine

        self._right = HuggingFaceEngine(tokenizer_dir)

    def encode(self, documents):
        ids, offsets = self._right.encode(documents)
        for index, text in enumerate(documents.to_pylist()):
            if "elephant" in text:
                ids[offsets[index]] += 1
        return EncodedDocuments(ids, offsets)


@pytest.fixture
def wrong_engine(monkeypatch):
    module = types.ModuleType("wrong_engine")
    module.WrongOnElephants = WrongOnElephants
    monkeypatch.setitem(sys.modules, "wrong_engine", module)
    monkeypatch.setitem(ENGINES._entries, "gigatoken", "wrong_engine:WrongOnElephants")


def test_auto_falls_back_at_once_when_the_sample_shows_a_difference(wrong_engine, tokenizer_dir, tmp_path, caplog):
    write_parquet(tmp_path / "in" / "a.parquet", ["an elephant"] * 10)
    assert run(tmp_path / "in", tokenizer_dir, tmp_path / "out", engine="auto").engine == "tokenizers"
    assert "falling back from gigatoken to tokenizers" in caplog.text
    assert "an elephant" in caplog.text


def test_a_difference_found_late_leaves_no_wrong_data_behind(wrong_engine, tokenizer_dir, tmp_path, caplog):
    # The sample looks at the first documents of a file; the elephants come last, in a row group of their own.
    texts = [f"{i} a horse " * 200 for i in range(45)] + ["an elephant"] * 3
    write_parquet(tmp_path / "in" / "a.parquet", texts, row_group_size=5)
    summary = run(tmp_path / "in", tokenizer_dir, tmp_path / "out", engine="auto", unit_bytes=1)
    assert caplog.text.count("doing everything again") == 1
    assert summary.engine == "tokenizers"
    run(tmp_path / "in", tokenizer_dir, tmp_path / "right", unit_bytes=1)
    assert documents_of(tmp_path / "out") == documents_of(tmp_path / "right")
    (folder,) = (tmp_path / "out/train").iterdir()
    assert {record.engine for record in load_records(folder)} == {"tokenizers"}
    # And the same command again finds it finished.
    assert run(tmp_path / "in", tokenizer_dir, tmp_path / "out", engine="auto", unit_bytes=1).engine == "tokenizers"


@pytest.mark.parametrize("path", sorted((ROOT / "config_hub/data").glob("optimize*.yaml")), ids=lambda path: path.name)
def test_every_example_configuration_is_understood(path):
    keywords = parse(optimize_dataset, [f"--config={path}", "--tokenizer_dir=T", "--output_dir=O"])
    assert keywords["output_dir"] == "O"
    assert set(load_yaml(path)) <= set(keywords)
