"""What inspect shows of a dataset; the histograms in words."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from pretrainkit import DatasetInfo, inspect_dataset
from pretrainkit.errors import ConfigError, DatasetError, TokenizerError
from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index
from pretrainkit.inspect import visible
from pretrainkit.metadata import TokenizerInfo
from pretrainkit.records import ChunkRecord
from pretrainkit.statistics import buckets, counted, histogram_lines, quantile_bounds
from pretrainkit.storage import checksum
from pretrainkit.verify import write_checksums

TEXTS = ["The quick brown fox.", "Δύο\x1b[31m!", "third"]


@pytest.fixture
def dataset(tmp_path, tokenizer_dir):
    """A merged dataset of TEXTS in one chunk, EOS after each."""
    from tokenizers import Tokenizer

    from pretrainkit.tokenizers.folder import copy_tokenizer, read_tokenizer

    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    info = read_tokenizer(tokenizer_dir)
    documents = [[*tokenizer.encode(text).ids, info.eos_id] for text in TEXTS]
    tokens = np.concatenate(documents).astype("uint16")
    path = folder / "chunk-0-0.bin"
    write_chunk(path, tokens, np.cumsum([len(d) for d in documents]))
    entry = ChunkEntry(path.name, path.stat().st_size, 3, len(tokens))
    write_index(folder, [entry], "uint16", 1 << 20)
    record = ChunkRecord(
        filename=path.name,
        split="train",
        documents=3,
        items=3,
        tokens=len(tokens),
        bytes=entry.chunk_bytes,
        checksum=checksum(path),
        max_token_id=int(tokens.max()),
    )
    write_checksums(folder, "f" * 64, [record])
    metadata = DatasetInfo(
        split="train",
        tokenizer=info,
        token_dtype="uint16",
        boundary="eos",
        documents=3,
        tokens=len(tokens),
        text_bytes=sum(len(text.encode()) for text in TEXTS),
        max_token_id=record.max_token_id,
        documents_in=7,
        dropped={"empty": 2, "null": 1},
        document_lengths={"2^2": 2, "2^4": 1},
        units=1,
        units_planned=1,
    )
    (folder / "metadata.json").write_text(metadata.to_json())
    copy_tokenizer(tokenizer_dir, folder / "tokenizer")
    return folder


def test_facts_account_for_every_row(dataset, capsys):
    inspect_dataset(dataset, samples=0)
    shown = capsys.readouterr().out
    assert "3 of split 'train'" in shown
    assert "7 = 3 here + 1 elsewhere + 3 dropped" in shown
    assert "2 empty, 1 null" in shown
    assert "eos, after each document (bos 510, eos 511)" in shown
    assert " 4 -  7" not in shown
    assert "4 - 7  ########################################  2" in shown


def test_samples_are_text_with_boundaries_on_lines_of_their_own(dataset, capsys):
    inspect_dataset(dataset, samples=1, sample_tokens=1000)
    shown = capsys.readouterr().out.split("sample 1 of 1: ")[1]
    assert shown.splitlines()[1:] == [
        "The quick brown fox.",
        "----- eos (511) -----",
        "Δύο\\x1b[31m!",
        "----- eos (511) -----",
        "third",
        "----- eos (511) -----",
    ]


def test_same_seed_shows_the_same_samples(dataset, capsys):
    inspect_dataset(dataset, samples=4, sample_tokens=3, seed=5)
    first = capsys.readouterr().out
    inspect_dataset(dataset, samples=4, sample_tokens=3, seed=5)
    assert capsys.readouterr().out == first
    inspect_dataset(dataset, samples=4, sample_tokens=3, seed=6)
    assert capsys.readouterr().out != first


def test_dataset_of_stock_litdata_is_shown_as_ids_or_with_a_tokenizer(dataset, tokenizer_dir, capsys):
    (dataset / "metadata.json").unlink()
    shutil.rmtree(dataset / "tokenizer")
    inspect_dataset(dataset, samples=1, sample_tokens=1000)
    shown = capsys.readouterr().out
    assert "metadata.json is missing" in shown
    assert shown.splitlines()[-1].endswith(" 511")
    inspect_dataset(dataset, samples=1, sample_tokens=1000, tokenizer_dir=tokenizer_dir)
    assert "The quick brown fox.<|endoftext|>" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["fast", "full"])
def test_verify_says_how_many_chunks_agree(dataset, capsys, level):
    inspect_dataset(dataset, samples=0, verify=level)
    assert f"verified ({level}): 1 chunk, as recorded" in capsys.readouterr().out


def test_full_verification_finds_a_flipped_bit(dataset):
    path = dataset / "chunk-0-0.bin"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(bytes(data))
    inspect_dataset(dataset, samples=0, verify="fast")
    with pytest.raises(DatasetError, match="another checksum"):
        inspect_dataset(dataset, samples=0, verify="full")


@pytest.mark.parametrize(
    "change",
    [
        lambda chunks: chunks[0].update(dim=3),
        lambda chunks: chunks[0].update(filename="chunk-0-9.bin"),
        lambda chunks: chunks.clear(),
        lambda chunks: chunks.append({**chunks[0], "filename": "chunk-0-9.bin"}),
    ],
)
@pytest.mark.parametrize("level", ["fast", "full"])
def test_verification_finds_an_index_that_is_not_what_was_recorded(dataset, change, level):
    index = json.loads((dataset / "index.json").read_text())
    change(index["chunks"])
    (dataset / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match=r"index\.json and what was recorded disagree on chunk-0-\d\.bin"):
        inspect_dataset(dataset, samples=0, verify=level)


def test_nothing_in_a_crafted_dataset_reaches_the_terminal_or_hangs(dataset, capsys):
    metadata = json.loads((dataset / "metadata.json").read_text())
    metadata["tokenizer"]["name"] = "\x1b[2J"
    (dataset / "metadata.json").write_text(json.dumps(metadata))
    inspect_dataset(dataset, samples=0)
    assert r"\x1b[2J" in capsys.readouterr().out
    for changes in ({"document_lengths": {"2^1": "a"}}, {"tokenizer": {**metadata["tokenizer"], "sha256": 5}}):
        (dataset / "metadata.json").write_text(json.dumps({**metadata, **changes}))
        with pytest.raises(DatasetError, match="holds values of other types"):
            inspect_dataset(dataset)
    (dataset / "metadata.json").unlink()
    (dataset / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be loaded by tokenizers"):
        inspect_dataset(dataset)
    (chunk,) = dataset.glob("chunk-*.bin")
    chunk.unlink()
    os.mkfifo(chunk)
    shutil.rmtree(dataset / "tokenizer")
    with pytest.raises(DatasetError, match="is not a regular file"):
        inspect_dataset(dataset)


def test_wrong_folders_and_numbers_get_one_clear_line(dataset, tmp_path):
    with pytest.raises(DatasetError, match=rf"give one of those in it, such as {dataset}"):
        inspect_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"has no index\.json"):
        inspect_dataset(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="samples=-1"):
        inspect_dataset(dataset, samples=-1)
    with pytest.raises(TokenizerError, match="is not a folder"):
        inspect_dataset(dataset, tokenizer_dir=tmp_path / "nothing")


def test_control_characters_are_shown_not_obeyed():
    assert visible("a\x1b[2J\r\n\tb\u202e\x00") == "a\\x1b[2J\\r\n\tb\\u202e\\x00"
    assert visible("naïve 数 é") == "naïve 数 é"


def test_histogram_has_its_empty_buckets_and_rounds_bars_up():
    histogram = {"2^0": 1, "2^3": 80}
    assert buckets(histogram) == [(1, 1, 1), (2, 3, 0), (4, 7, 0), (8, 15, 80)]
    assert [line.split() for line in histogram_lines(histogram)] == [
        ["1", "#", "1"],
        ["2", "-", "3", "0"],
        ["4", "-", "7", "0"],
        ["8", "-", "15", "#" * 40, "80"],
    ]
    assert quantile_bounds(histogram, 0.5) == (8, 15)
    assert quantile_bounds(histogram, 0.0) == (1, 1)
    assert quantile_bounds({}, 0.5) == (0, 0)
    assert histogram_lines({}) == []


def test_metadata_comes_back_from_its_json():
    info = DatasetInfo(
        split="val",
        tokenizer=TokenizerInfo(name="t", sha256="0", vocab_size=9, eos_id=8),
        token_dtype="int32",
        boundary="both",
        dropped={"empty": 1},
    )
    assert DatasetInfo.from_json(info.to_json()) == info
    with pytest.raises(DatasetError, match="unknown key 'documens'"):
        DatasetInfo.from_json(info.to_json().replace('"documents"', '"documens"'))
    for wrong, message in {
        '"documents": "3"': "documents is '3', not a count",
        '"documents": -1': "documents is -1, not a count",
        '"documents": true': "documents is True, not a count",
    }.items():
        with pytest.raises(DatasetError, match=message):
            DatasetInfo.from_json(info.to_json().replace('"documents": 0', wrong))
    with pytest.raises(DatasetError, match="token_dtype is 'float64'"):
        DatasetInfo.from_json(info.to_json().replace('"int32"', '"float64"'))
    with pytest.raises(DatasetError, match="values of other types"):
        DatasetInfo.from_json(info.to_json().replace('"dropped": {\n    "empty": 1\n  }', '"dropped": 7'))
    with pytest.raises(DatasetError, match="format_version 9"):
        DatasetInfo.from_json(dataclasses.replace(info, format_version=9).to_json())


def test_a_count_and_its_noun_agree():
    assert [counted(n, "chunk") for n in (0, 1, 2, 1234)] == ["0 chunks", "1 chunk", "2 chunks", "1,234 chunks"]
