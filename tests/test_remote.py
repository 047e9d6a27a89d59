"""Inputs and outputs on object storage, against a loopback S3 server; connections that drop; the hub's layout."""

from __future__ import annotations

import fsspec
import pytest

from pretrainkit import storage
from pretrainkit.errors import InputError, StorageError
from pretrainkit.optimize import inputs, optimize_dataset
from pretrainkit.storage import RetryingFile, list_files
from tests.conftest import make_texts, write_parquet
from tests.test_executors import digests
from tests.test_optimize import all_bytes

FLAGS = {"num_workers": 0, "engine": "tokenizers", "unit_bytes": 40_000, "val_fraction": 0.1}


@pytest.mark.slow
def test_object_storage_gives_the_bytes_of_local_files(s3, tmp_path, tokenizer_dir):
    for name in ("b", "a", "deep/c"):
        path = write_parquet(tmp_path / f"in/{name}.parquet", make_texts(150, seed=len(name) + ord(name[0])))
        s3.put_file(str(path), f"bucket/in/{name}.parquet")
    local = optimize_dataset(tokenizer_dir, tmp_path / "out", tmp_path / "in", **FLAGS)
    remote = optimize_dataset(tokenizer_dir, "s3://bucket/out", "s3://bucket/in", **FLAGS)
    assert (remote.tokens, remote.documents) == (local.tokens, local.documents)
    # The plan is the same, too: it holds names relative to the input folder.
    s3.get("bucket/out", str(tmp_path / "fetched"), recursive=True)
    assert digests(tmp_path / "fetched") == digests(tmp_path / "out")
    fetched, expected = all_bytes(tmp_path / "fetched"), all_bytes(tmp_path / "out")
    assert {name: fetched[name] for name in fetched if not name.startswith("tokenizer/")} == {
        name: expected[name] for name in expected if not name.startswith("tokenizer/")
    }


@pytest.mark.slow
def test_a_job_on_object_storage_goes_on_where_it_stopped_and_refuses_other_settings(s3, tmp_path, tokenizer_dir):
    s3.put_file(str(write_parquet(tmp_path / "a.parquet", make_texts(300))), "bucket/more/a.parquet")
    first = optimize_dataset(tokenizer_dir, "s3://bucket/resumed", "s3://bucket/more", **FLAGS)
    units = [path for path in s3.find("bucket/resumed/train") if "/units/" in path]
    kept = {path: s3.info(path)["LastModified"] for path in units[1:]}
    s3.rm_file(units[0])
    second = optimize_dataset(tokenizer_dir, "s3://bucket/resumed", "s3://bucket/more", **FLAGS)
    assert (first.tokens, first.units) == (second.tokens, second.units)
    assert {path: s3.info(path)["LastModified"] for path in units[1:]} == kept
    with pytest.raises(StorageError, match=r"was made with other inputs or settings: val_fraction"):
        optimize_dataset(tokenizer_dir, "s3://bucket/resumed", "s3://bucket/more", **{**FLAGS, "val_fraction": 0.2})


class DroppingConnections:
    """A file system whose every second read fails."""

    def __init__(self, data):
        self.data, self.calls = data, 0

    def info(self, path):
        return {"size": len(self.data)}

    def cat_file(self, path, start, end):
        self.calls += 1
        if self.calls % 2:
            raise ConnectionResetError("dropped")
        return self.data[start:end]


def test_a_dropped_connection_is_tried_again(monkeypatch):
    fs = DroppingConnections(bytes(range(100)))
    monkeypatch.setattr(storage, "filesystem", lambda url: (fs, "x"))
    monkeypatch.setattr(storage, "_RETRY_PAUSES_S", (0, 0))
    with RetryingFile("s3://bucket/x") as file:
        assert file.read(10) == bytes(range(10))
        file.seek(-5, 2)
        assert file.read() == bytes(range(95, 100))
    fs.data = fs.data[:50]
    with RetryingFile("s3://bucket/x") as file:
        fs.data = b"short"
        with pytest.raises(StorageError, match="gave 5 bytes where 50 were due; it changed"):
            file.read()


def test_a_remote_listing_is_sorted_and_relative():
    fs = fsspec.filesystem("memory")
    for name in ("b.parquet", "a/c.parquet", "a.txt"):
        fs.pipe(f"/listing/{name}", b"x" * len(name))
    files = list_files("memory://listing", (".parquet",))
    assert [(file.name, file.size) for file in files] == [("a/c.parquet", 11), ("b.parquet", 9)]
    assert fsspec.open(files[0].path).open().read() == b"x" * 11


def test_a_hub_dataset_is_its_parquet_copy(monkeypatch):
    fs = fsspec.filesystem("memory")
    for split in ("train", "test"):
        fs.pipe(f"/hub/only-config/{split}/0000.parquet", b"")
    monkeypatch.setattr(inputs, "filesystem", lambda url: (fs, "/hub"))
    assert inputs.hub_folder("me/it", "default", "train") == (
        "hf://datasets/me/it@refs/convert/parquet/only-config/train"
    )
    with pytest.raises(InputError, match="has no split 'validation'; it has test, train"):
        inputs.hub_folder("me/it", "only-config", "validation")
    fs.pipe("/hub/only-config/partial-large/0000.parquet", b"")
    with pytest.raises(InputError, match="holds only the beginning of 'large'"):
        inputs.hub_folder("me/it", "only-config", "large")
    with pytest.raises(InputError, match="has no configuration 'en'; it has only-config"):
        inputs.hub_folder("me/it", "en", "train")
