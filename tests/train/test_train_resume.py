"""Going on with something changed: batch sizes, mixtures, datasets; the data goes on with the first block not taken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pretrainkit.config import DataConfig, ScheduleConfig
from pretrainkit.errors import Interrupted
from pretrainkit.train import pretrain
from pretrainkit.train.manifest import MANIFEST_FILENAME, hash_files, read_manifest, write_manifest
from tests.train.conftest import write_split
from tests.train.test_train_run import stop_at

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


def state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())["state"]


def run_and_stop(monkeypatch, step: int, arguments: dict) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, step=step)
        with pytest.raises(Interrupted):
            pretrain(**arguments)


@pytest.mark.slow
def test_another_batch_size_goes_on_with_the_next_block_and_ends_at_the_same_token(
    settings, rows, monkeypatch, tmp_path, caplog
):
    tokens = 12 * 16 * 32
    limits = {"max_steps": None, "max_tokens": tokens, "lr_warmup_steps": 2}
    pretrain(**settings(out_dir=tmp_path / "whole", train=limits))

    first = settings(out_dir=tmp_path / "parts", resume="auto", train=limits)
    run_and_stop(monkeypatch, 3, first)
    second = {"global_batch_size": 8, "micro_batch_size": 2}
    run_and_stop(monkeypatch, 9, settings(out_dir=tmp_path / "parts", resume="auto", train=limits | second))
    caplog.clear()
    third = {"global_batch_size": 24, "micro_batch_size": 8}
    pretrain(**settings(out_dir=tmp_path / "parts", resume="auto", train=limits | third))

    assert "changed since that checkpoint: train.global_batch_size: 8 -> 24" in caplog.text
    whole = {row["tokens"]: row for row in rows(tmp_path / "whole")}
    parts = {row["tokens"]: row for row in rows(tmp_path / "parts")}
    assert list(parts) == [512 * step for step in (1, 2, 3)] + [1536 + 256 * step for step in range(1, 7)] + [
        3072 + 768 * step for step in range(1, 5)
    ]
    both = sorted(whole.keys() & parts.keys())
    assert both == [512, 1024, 1536, 2048, 2560, 3072, 4608, tokens]
    assert [parts[count]["digest"] for count in both] == [whole[count]["digest"] for count in both]
    assert [parts[count]["learning_rate"] for count in both] == [whole[count]["learning_rate"] for count in both]
    assert [row["changed"] for row in rows(tmp_path / "parts", "resume")] == [
        ["train.global_batch_size: 16 -> 8", "train.micro_batch_size: 4 -> 2"],
        ["train.global_batch_size: 8 -> 24", "train.micro_batch_size: 2 -> 8"],
    ]
    state = state_of(tmp_path / "parts" / "final")
    assert (state["step"], state["tokens"], state["samples"]) == (13, tokens, 192)
    assert state["portions"] == [
        {"first_step": 0, "first_token": 0, "tokens_per_step": 512},
        {"first_step": 3, "first_token": 1536, "tokens_per_step": 256},
        {"first_step": 9, "first_token": 3072, "tokens_per_step": 768},
    ]


@pytest.mark.slow
def test_stopping_after_a_change_of_the_batch_size_changes_nothing(settings, rows, monkeypatch, tmp_path):
    changed = {"global_batch_size": 8, "max_steps": None, "epochs": 0.15}
    for name, stops in (("whole", ()), ("parts", (6, 11))):
        run_and_stop(monkeypatch, 4, settings(out_dir=tmp_path / name, train=changed | {"global_batch_size": 16}))
        for step in stops:
            run_and_stop(monkeypatch, step, settings(out_dir=tmp_path / name, resume="auto", train=changed))
        pretrain(**settings(out_dir=tmp_path / name, resume="auto", train=changed))
    keys = ("step", "tokens", "loss", "learning_rate", "digest", "epoch")
    first, second = ([[row[key] for key in keys] for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert first == second
    # 0.15 x 1,212 blocks: 64 in steps of 16, then as many whole steps of 8 as fit.
    assert first[-1][:2] == [4 + 14, (64 + 14 * 8) * 32]


@pytest.mark.slow
def test_a_mixture_that_changes_goes_on_in_each_source(settings, rows, monkeypatch, tmp_path, caplog):
    for seed, name in enumerate("abc"):
        write_split(tmp_path / name / "train", "train", 4000, seed=seed)
    a, b, c = (str(tmp_path / name) for name in "abc")
    changed = {"global_batch_size": 12, "max_steps": 6}
    constant = {"out_dir": tmp_path / "run", "dataset_path": None, "schedule": ScheduleConfig(name="constant")}
    run_and_stop(
        monkeypatch, 3, settings(**constant, data=DataConfig(sources={a: 3.0, b: 1.0}), train={"max_steps": 6})
    )
    with caplog.at_level(logging.WARNING):
        arguments = settings(**constant, data=DataConfig(sources={b: 1.0, c: 2.0}), train=changed, resume="auto")
        pretrain(**arguments)
    assert "changed since that checkpoint: train.global_batch_size: 16 -> 12" in caplog.text
    assert f"{b}/train has a share of 0.3333 instead of 0.25, going on after 12 blocks of it" in caplog.text
    assert f"{c}/train is read too, beginning after 0 blocks of it" in caplog.text
    assert f"{a}/train is not read any more, after 36 blocks of it" in caplog.text
    last = rows(tmp_path / "run")[-1]
    assert last["tokens_per_source"] == {
        f"{a}/train": 36 * 32, f"{b}/train": (12 + 12) * 32, f"{c}/train": 24 * 32,
    }  # fmt: skip
    assert last["tokens"] == sum(last["tokens_per_source"].values())


def rewrite_as_before_cursors(folder: Path) -> None:
    """Take out of a checkpoint what older versions did not write."""
    record = json.loads((folder / "state.json").read_text())
    for key in ("cursor", "portions"):
        del record["state"][key]
    (folder / "state.json").write_text(json.dumps(record))
    step, files = read_manifest(folder)
    write_manifest(folder, step, files | hash_files(folder, ["state.json"]))
    assert (folder / MANIFEST_FILENAME).is_file()


@pytest.mark.slow
def test_checkpoints_of_older_versions_go_on(settings, rows, monkeypatch, tmp_path):
    for name in ("new", "old"):
        arguments = settings(out_dir=tmp_path / name, resume="auto")
        run_and_stop(monkeypatch, 6, arguments)
        if name == "old":
            rewrite_as_before_cursors(tmp_path / name / "step-00000006")
        pretrain(**arguments)
    assert [row["loss"] for row in rows(tmp_path / "old")] == [row["loss"] for row in rows(tmp_path / "new")]
    assert state_of(tmp_path / "old" / "final")["cursor"] == state_of(tmp_path / "new" / "final")["cursor"]
