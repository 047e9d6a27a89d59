"""Inputs and outputs on object storage, against a loopback S3 server; connections that drop; the hub's layout."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import botocore.exceptions
import fsspec
import httpx
import pytest

from pretrainkit import remote
from pretrainkit.errors import InputError, StorageError, UnreachableError
from pretrainkit.optimize import inputs, optimize_dataset
from pretrainkit.remote import RetryingFile, patiently
from pretrainkit.storage import list_files
from tests.conftest import make_texts, write_parquet
from tests.test_executors import digests
from tests.test_optimize import all_bytes

ROOT = Path(__file__).parent.parent
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

    def invalidate_cache(self):
        pass

    def cat_file(self, path, start, end):
        self.calls += 1
        if self.calls % 2:
            raise ConnectionResetError("dropped")
        return self.data[start:end]


def test_a_dropped_connection_is_tried_again(monkeypatch):
    fs = DroppingConnections(bytes(range(100)))
    monkeypatch.setattr(remote, "filesystem", lambda url: (fs, "x"))
    monkeypatch.setattr(remote, "_RETRY_PAUSES_S", (0, 0))
    with RetryingFile("s3://bucket/x") as file:
        assert file.read(10) == bytes(range(10))
        file.seek(-5, 2)
        assert file.read() == bytes(range(95, 100))
    fs.data = fs.data[:50]
    with RetryingFile("s3://bucket/x") as file:
        fs.data = b"short"
        with pytest.raises(StorageError, match="gave 5 bytes where 50 were due; it changed"):
            file.read()


@pytest.mark.parametrize(
    ("error", "message", "tries"),
    [
        (TimeoutError("slow"), "slow; run the same command again when it can be reached, finished work is kept", 3),
        (ConnectionResetError(), "ConnectionResetError; run the same command again", 3),
        (httpx.RemoteProtocolError("cut"), "cut; run the same command again", 3),
        (aiohttp.ClientPayloadError("cut"), "cut; run the same command again", 3),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="E"), "run the same command again", 3),
        (PermissionError("Forbidden"), "Forbidden; check the credentials", 1),
        (botocore.exceptions.NoCredentialsError(), "Unable to locate credentials; give credentials, such as AWS_", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_waiting_mends_is_tried_again_and_the_rest_said_at_once(monkeypatch, error, message, tries):
    monkeypatch.setattr(remote, "_RETRY_PAUSES_S", (0, 0))
    fs, calls = DroppingConnections(b""), []

    def fail():
        calls.append(1)
        raise error

    with pytest.raises(UnreachableError, match=f"cannot reach s3://bucket/x: .*{message}"):
        patiently("s3://bucket/x", fs, fail)
    assert len(calls) == tries


def test_a_bug_is_no_bad_connection(tmp_path):
    with pytest.raises(ZeroDivisionError):
        patiently("s3://bucket/x", DroppingConnections(b""), lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        patiently("s3://bucket/x", DroppingConnections(b""), (tmp_path / "missing").read_bytes)


@pytest.mark.parametrize("on_bad_input", ["fail", "skip"])
@pytest.mark.parametrize(("suffix", "reads"), [(".parquet", 0), (".parquet", 2), (".jsonl", 0), (".jsonl.gz", 0)])
def test_a_store_that_cannot_be_reached_is_no_bad_file(
    monkeypatch, tmp_path, tokenizer_dir, on_bad_input, suffix, reads
):
    """It must not be counted as bad input either, once the plan is made."""
    fs = fsspec.filesystem("memory")
    if suffix == ".parquet":
        data = write_parquet(tmp_path / "a.parquet", make_texts(300)).read_bytes()
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(300)).encode()
        data = gzip.compress(data) if suffix == ".jsonl.gz" else data
    source = f"memory://{tmp_path.name}"
    fs.pipe(f"/{tmp_path.name}/a{suffix}", data)
    monkeypatch.setattr(remote, "_RETRY_PAUSES_S", ())
    cat_file, left = fs.cat_file, [None] * reads

    def cat(path, start=None, end=None):
        if (tmp_path / "out/plan.json").exists():
            if not left:
                raise TimeoutError("the network is gone")
            left.pop()
        return cat_file(path, start, end)

    monkeypatch.setattr(type(fs), "cat_file", lambda self, *args, **kwargs: cat(*args, **kwargs))
    flags = {**FLAGS, "on_bad_input": on_bad_input}
    with pytest.raises(UnreachableError, match=f"cannot reach {source}/a{suffix}: the network is gone"):
        optimize_dataset(tokenizer_dir, tmp_path / "out", source, **flags)
    assert not (tmp_path / "out/failures.jsonl").exists()
    monkeypatch.undo()
    assert optimize_dataset(tokenizer_dir, tmp_path / "out", source, **flags).documents_in == 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target", "credentials", "message"),
    [
        ("s3://bucket/lines", None, False, "Unable to locate credentials; give credentials, such as AWS_ACCESS_KEY_ID"),
        (
            "s3://bucket/lines/a.jsonl",
            None,
            True,
            "s3://bucket/lines/a.jsonl is a file; give its folder, s3://bucket/l",
        ),
        ("s3://missing/lines", None, True, "s3://missing/lines does not exist, or is not shown to you"),
        (
            "s3://bucket/lines",
            "s3://missing/out",
            True,
            "cannot write s3://missing/out/plan.json: The specified bucket",
        ),
    ],
)
def test_what_an_object_store_refuses_is_one_line(s3, tokenizer_dir, tmp_path, source, target, credentials, message):
    s3.pipe("bucket/lines/a.jsonl", b'{"text": "a"}')
    keys = {} if credentials else {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    environ = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **keys}
    flags = {"input_dir": source, "output_dir": target or tmp_path / "out", "tokenizer_dir": tokenizer_dir}
    done = subprocess.run(
        [sys.executable, "optimize_dataset.py", *[f"--{name}={value}" for name, value in flags.items()]],
        cwd=ROOT,
        env={name: value for name, value in environ.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert message in line


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
