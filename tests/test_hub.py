"""Datasets of the Hugging Face hub, by the real huggingface_hub and the real command, from a hub on this machine."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pretrainkit.optimize import optimize_dataset
from tests.chaos.oracle import differences, tree
from tests.conftest import make_texts, write_parquet
from tests.hub import Dataset, HubServer

ROOT = Path(__file__).parent.parent
FLAGS = {"engine": "tokenizers", "unit_bytes": 60_000, "val_fraction": 0.1, "num_workers": 0}
PARQUET = "refs/convert/parquet"

# The command, but for the pauses between two tries.
IMPATIENT = """
import sys
import pretrainkit.remote
from pretrainkit.cli import run_command
pretrainkit.remote._RETRY_PAUSES_S = (0, 0)
run_command("optimize", sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset's Parquet copy, as the hub lays it out."""
    folder = tmp_path_factory.mktemp("hub")
    for index in range(5):
        write_parquet(folder / f"default/train/{index:04}.parquet", make_texts(120, seed=index))
    write_parquet(folder / "default/test/0000.parquet", make_texts(10))
    write_parquet(folder / "default/partial-large/0000.parquet", make_texts(10))
    return folder


@pytest.fixture
def hub(folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}
    dataset = Dataset({"main": {"README.md": b"a dataset", ".gitattributes": b"", **files}, PARQUET: files})
    with HubServer({"me/it": dataset}) as hub:
        yield hub


@pytest.fixture(scope="module")
def local(folder, tokenizer_dir, tmp_path_factory):
    """What the same files give from a local folder."""
    output_dir = tmp_path_factory.mktemp("local") / "out"
    optimize_dataset(tokenizer_dir, output_dir, folder / "default/train", **FLAGS)
    return tree(output_dir)


@pytest.fixture
def run(hub, tokenizer_dir, tmp_path):
    """Runs the command against the hub; returns the finished process."""

    def run(*arguments, token=None, out=tmp_path / "out", program=("optimize_dataset.py",), **environ):
        flags = {**FLAGS, "tokenizer_dir": tokenizer_dir, "output_dir": out}
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf-home"),
            **({} if token is None else {"HF_TOKEN": token}),
            **environ,
        }
        return subprocess.run(
            [sys.executable, *program, *[f"--{name}={value}" for name, value in flags.items()], *arguments],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def only_line(done):
    """What a command that must end with exit code 2 says."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.slow
def test_a_hub_dataset_gives_the_bytes_of_its_files(hub, run, local, tmp_path):
    done = run("--hf_dataset", "me/it", "--split", "train")
    assert done.returncode == 0, done.stderr
    assert "HTTP" not in done.stderr
    assert differences(tree(tmp_path / "out"), local) == []
    assert {method for method, _, _ in hub.requests} == {"GET"}
    fetched = [wanted for _, path, wanted in hub.requests if path.startswith("/storage/")]
    assert None not in fetched, "no file was fetched whole"


@pytest.mark.slow
def test_a_folder_of_a_hub_repository_gives_the_bytes_of_its_files(run, local, tmp_path):
    done = run("--input_dir=hf://datasets/me/it/default/train", "--num_workers=2")
    assert done.returncode == 0, done.stderr
    assert differences(tree(tmp_path / "out"), local) == []


@pytest.mark.slow
def test_connections_that_drop_are_tried_again_and_nothing_is_lost(hub, run, local, tmp_path):
    # In the middle of the first and a later read, of a listing's second page, of the branch's description; a busy hub.
    hub.drops += ["0000.parquet", "0003.parquet", "0003.parquet", "default/train?recursive=True&cursor=2", "revision"]
    hub.busy += ["0001.parquet"]
    done = run("--hf_dataset=me/it", program=("-c", IMPATIENT))
    assert done.returncode == 0, done.stderr
    assert (hub.drops, hub.busy) == ([], [])
    assert done.stderr.count("trying again") == 5
    assert differences(tree(tmp_path / "out"), local) == []


@pytest.mark.slow
@pytest.mark.parametrize("on_bad_input", ["fail", "skip"])
def test_a_hub_that_goes_away_costs_no_document(hub, run, local, tmp_path, on_bad_input):
    """A moment without network must not count as bad input, not even where that is skipped."""
    flags = ["--hf_dataset=me/it", f"--on_bad_input={on_bad_input}"]
    # Planning reads footers, which lie at the end; the work reads the rows.
    hub.gone_after = 12
    done = run(*flags, program=("-c", IMPATIENT))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot reach hf://datasets/me/it@refs/convert/parquet/default/train/"), last
    assert last.endswith("; run the same command again when it can be reached, finished work is kept"), last
    assert not (tmp_path / "out/failures.jsonl").exists()
    hub.gone_after = None
    done = run(*flags, program=("-c", IMPATIENT))
    assert done.returncode == 0, done.stderr
    assert differences(tree(tmp_path / "out"), local) == []


@pytest.mark.slow
def test_a_gated_dataset_needs_its_token_which_goes_to_the_hub_alone(hub, run, local, tmp_path):
    hub.datasets["me/it"].token = "hf_secret"
    for token in (None, "hf_other"):
        line = only_line(run("--hf_dataset=me/it", token=token))
        assert line.startswith("error: cannot reach hf://datasets/me/it@refs/convert/parquet/default/train/"), line
        assert "Access to dataset me/it is restricted" in line
        assert line.endswith("; check the credentials (HF_TOKEN for the hub) and that they may read it"), line
        assert not (tmp_path / "out").exists()
    done = run("--hf_dataset=me/it", token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert differences(tree(tmp_path / "out"), local) == []
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--hf_dataset=me/none"],
            "the hub shows no dataset 'me/none', or no Parquet copy of it (me/none@refs/convert",
        ),
        (
            ["--hf_dataset=me/it", "--split=dev"],
            "me/it has no split 'dev'; it has partial-large, test, train (--split)",
        ),
        (["--hf_dataset=me/it", "--split=large"], "Parquet copy of me/it holds only the beginning of 'large'"),
        (["--hf_dataset=me/it", "--hf_config=en"], "me/it has no configuration 'en'; it has default (--hf_config)"),
        (["--input_dir=hf://datasets/me/none/x"], "hf://datasets/me/none/x does not exist, or is not shown to you"),
        (["--input_dir=hf://datasets/me/it@v9/x"], "does not exist, or is not shown to you (me/it@v9/x (revision not"),
        (["--input_dir=hf://datasets/me/it/nothing"], "has no file ending in .parquet, .jsonl"),
        (["--input_dir=hf://datasets/me"], "on the hub, give hf://datasets/OWNER/NAME"),
        (
            ["--input_dir=hf://datasets/me/it/default/train/0000.parquet"],
            "0000.parquet is a file; give its folder, hf://datasets/me/it/default/train",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_hub_does_not_have_is_named_in_one_line(run, tmp_path, arguments, message):
    line = only_line(run(*arguments))
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_a_network_the_command_says_so_in_one_line(run, hub):
    line = only_line(run("--hf_dataset=me/it", HF_HUB_OFFLINE="1"))
    assert line.endswith("; unset HF_HUB_OFFLINE")
    done = run("--hf_dataset=me/it", program=("-c", IMPATIENT), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert [line.rsplit("; ", 1)[1] for line in done.stderr.splitlines()] == [
        "trying again in 0 s",
        "trying again in 0 s",
        "run the same command again when it can be reached, finished work is kept",
    ]


@pytest.mark.slow
def test_compressed_lines_are_fetched_in_large_pieces(hub, run, tmp_path, tokenizer_dir):
    texts = [random.Random(i).randbytes(500).hex() for i in range(1500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    data = gzip.compress(lines, 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.gz").write_bytes(data)
    hub.datasets["me/lines"] = Dataset({"main": {"a.jsonl.gz": data}})
    done = run("--input_dir=hf://datasets/me/lines")
    assert done.returncode == 0, done.stderr
    optimize_dataset(tokenizer_dir, tmp_path / "local", tmp_path / "in", **FLAGS)
    assert differences(tree(tmp_path / "out"), tree(tmp_path / "local")) == []
    fetched = [wanted for _, path, wanted in hub.requests if path.startswith("/storage/")]
    assert len(data) > 10 * (64 << 10)
    # Beginning and end for the fingerprint, the first lines, the engine's sample, and the whole once.
    assert fetched.count(f"bytes=0-{len(data) - 1}") == 1
    assert len(fetched) < 16
