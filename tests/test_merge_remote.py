"""Merging from, to and between object stores, on a server of our own: the bytes of a local merge."""

from __future__ import annotations

import pytest

from pretrainkit import merge_datasets
from pretrainkit.errors import DatasetError, StorageError
from tests.test_merge import SPREADS, contents, make_units, write_nodes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(s3, tmp_path_factory):
    """A local source, its upload to s3://bucket/nodes/train, and its local merge."""
    folder = tmp_path_factory.mktemp("merge-remote")
    # Blocks of 4 and chunks small enough that some are linked as they lie and some joined.
    write_nodes(folder / "s", make_units(6, 4), SPREADS[3], block_size=4, settings={"chunk_bytes": 128})
    merge_datasets(folder / "s", folder / "t")
    for path in sorted((folder / "s").rglob("*")):
        if path.is_file():
            s3.put_file(str(path), f"bucket/nodes/train/{path.relative_to(folder / 's')}")
    return folder


def stored(fs, prefix):
    return {path.removeprefix(f"{prefix}/"): fs.cat_file(path) for path in sorted(fs.find(prefix))}


@pytest.mark.parametrize("level", ["fast", "full"])
def test_between_two_places_of_a_store(home, s3, level):
    merge_datasets("s3://bucket/nodes/train", f"s3://bucket/{level}/train", verify=level)
    assert stored(s3, f"bucket/{level}/train") == contents(home / "t")


def test_from_local_folders_to_a_store_and_again(home, s3, caplog):
    info = merge_datasets(home / "s", "s3://bucket/up/train")
    assert stored(s3, "bucket/up/train") == contents(home / "t")
    caplog.set_level("INFO")
    assert merge_datasets(home / "s", "s3://bucket/up/train") == info
    assert "is complete already" in caplog.text


def test_from_a_store_to_a_local_folder(home, s3, tmp_path):
    info = merge_datasets("s3://bucket/nodes/train", tmp_path / "down")
    assert contents(tmp_path / "down") == contents(home / "t")
    assert merge_datasets("s3://bucket/nodes/train", tmp_path / "down") == info
    assert [path.name for path in tmp_path.iterdir()] == ["down"]


def test_a_folder_of_that_name_with_other_data_is_left_alone(home, s3, tmp_path):
    (tmp_path / ".down.fetched").mkdir()
    (tmp_path / ".down.fetched/precious.txt").write_text("x")
    with pytest.raises(StorageError, match=r"\.down\.fetched holds precious\.txt, which is no part of s3://bucket"):
        merge_datasets("s3://bucket/nodes/train", tmp_path / "down")
    (tmp_path / ".down.fetched/precious.txt").rename(tmp_path / "precious.txt")
    merge_datasets("s3://bucket/nodes/train", tmp_path / "down")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["down", "precious.txt"]


def test_an_interrupted_merge_into_a_store_goes_on(home, s3, monkeypatch):
    copy, calls = s3.cp_file, []

    def dying(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(s3, "cp_file", dying)
        with pytest.raises(KeyboardInterrupt):
            merge_datasets("s3://bucket/nodes/train", "s3://bucket/cut/train")
    assert not s3.exists("bucket/cut/train/index.json")
    merge_datasets("s3://bucket/nodes/train", "s3://bucket/cut/train")
    assert stored(s3, "bucket/cut/train") == contents(home / "t")


def test_what_is_wrong_in_a_store_is_named(home, s3):
    with pytest.raises(DatasetError, match="holds nothing"):
        merge_datasets("s3://bucket/nothing", "s3://bucket/x")
    with pytest.raises(StorageError, match="mode=link"):
        merge_datasets("s3://bucket/nodes/train", "s3://bucket/x", mode="link")
    s3.pipe_file("bucket/taken/precious.txt", b"x")
    with pytest.raises(StorageError, match=r"holds other data \(precious\.txt\)"):
        merge_datasets("s3://bucket/nodes/train", "s3://bucket/taken")
    whole = s3.cat_file("bucket/nodes/train/n1/chunk-0-0.bin")
    s3.pipe_file("bucket/nodes/train/n1/chunk-0-0.bin", whole[:-1] + b"?")
    with pytest.raises(DatasetError, match=r"/n1/chunk-0-0\.bin has another checksum than its record"):
        merge_datasets("s3://bucket/nodes/train", "s3://bucket/x", verify="full")
    s3.pipe_file("bucket/nodes/train/n1/chunk-0-0.bin", b"short")
    with pytest.raises(DatasetError, match=r"chunk-0-0\.bin has 5 bytes, its record says"):
        merge_datasets("s3://bucket/nodes/train", "s3://bucket/x")
    assert not s3.exists("bucket/x")
