"""Which checkpoint of its folder a run goes on from, and what becomes of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrainkit.config import CheckpointConfig, GuardConfig, OptimizerArgs, OptimizerConfig
from pretrainkit.errors import CheckpointError, TrainingError
from pretrainkit.train import loop, pretrain, setup
from pretrainkit.train.manifest import read_manifest
from pretrainkit.train.run_folder import bring_back_replaced, verify_checkpoint
from tests.train.test_train_resume import run_and_stop
from tests.train.test_train_run import poison

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

OTHER_RATE = OptimizerConfig(init_args=OptimizerArgs(lr=3e-3))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir())


def flip_a_bit(folder: Path) -> None:
    tensors = next((folder / "lit_model.pth").glob("*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)  # in place: a hard link to it is damaged as well


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target


@pytest.fixture
def finished(settings) -> Path:
    """A run of 12 steps that saved every 4."""
    arguments = settings()
    pretrain(**arguments)
    return arguments["out_dir"]


def test_final_is_of_the_way_the_run_took_last(settings, finished):
    before = read_manifest(finished / "final")
    pretrain(**settings(resume=finished / "step-00000004", optimizer=OTHER_RATE))
    assert read_manifest(finished / "final") == read_manifest(finished / "step-00000012") != before
    assert read_manifest(finished / "final.aside") == read_manifest(finished / "step-00000012.aside") == before
    pretrain(**settings(resume=finished / "step-00000004"))
    assert read_manifest(finished / "final.aside") == before, "what is set aside stays"
    assert {"final.aside-2", "step-00000008.aside", "step-00000008.aside-2"} <= set(names(finished))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_along_the_way_it_had_taken(settings, finished, monkeypatch, caplog):
    run_and_stop(monkeypatch, 6, settings(resume=finished / "step-00000004", optimizer=OTHER_RATE))
    assert names(finished)[-1] == "step-00000012.aside"
    caplog.clear()
    caplog.set_level("INFO")
    pretrain(**settings(resume="auto", optimizer=OTHER_RATE))
    assert f"going on from {finished / 'step-00000006'}" in caplog.text


def test_a_checkpoint_just_written_is_kept_whatever_lies_beside_it(settings, finished):
    train = {"max_steps": 7, "save_interval": 3}
    keep = CheckpointConfig(keep_last=1, keep_every=5)
    pretrain(**settings(resume=finished / "step-00000004", train=train, checkpoint=keep))
    verify_checkpoint(finished / "step-00000007")
    verify_checkpoint(finished / "final")
    assert [name for name in names(finished) if "aside" not in name] == ["final", "step-00000007"]


def test_damaged_results_are_made_again(settings, finished, caplog):
    flip_a_bit(finished / "final")
    with pytest.raises(CheckpointError):
        verify_checkpoint(finished / "step-00000012")  # one file with two names
    caplog.set_level("INFO")
    pretrain(**settings(resume="auto"))
    assert f"going on from {finished / 'step-00000008'}" in caplog.text
    verify_checkpoint(finished / "final")
    verify_checkpoint(finished / "step-00000012")
    assert {"final.aside", "step-00000012.aside"} <= set(names(finished))
    caplog.clear()
    pretrain(**settings(resume="auto"))
    assert "this run is finished" in caplog.text


@pytest.mark.slow
def test_a_damaged_final_is_made_of_its_whole_checkpoint(settings, finished, caplog):
    copy = copied(finished / "final", finished / "copy")  # as on a file system without hard links
    shutil.rmtree(finished / "final")
    copy.rename(finished / "final")
    flip_a_bit(finished / "final")
    whole = read_manifest(finished / "step-00000012")
    caplog.set_level("INFO")
    pretrain(**settings(resume="auto"))
    assert f"going on from {finished / 'step-00000012'}" in caplog.text
    verify_checkpoint(finished / "final")
    assert read_manifest(finished / "final") == read_manifest(finished / "step-00000012") == whole, "saved only once"


@pytest.mark.slow
def test_nothing_whole_to_go_on_from_is_said(settings, finished, caplog):
    for name in ("final", "step-00000004", "step-00000008"):
        flip_a_bit(finished / name)
    pretrain(**settings(resume="auto"))
    assert "holds no whole checkpoint: the run begins anew" in caplog.text
    verify_checkpoint(finished / "final")


@pytest.mark.slow
def test_a_replacement_that_was_interrupted_is_undone(settings, finished, caplog):
    shutil.rmtree(finished / "final")
    last = finished / "step-00000012"
    shutil.copytree(last, finished / "step-00000012.partial")
    last.rename(finished / "step-00000012.replaced")
    caplog.set_level("INFO")
    pretrain(**settings(resume="auto"))
    assert f"going on from {last}" in caplog.text
    assert names(finished) == ["final", "step-00000004", "step-00000008", "step-00000012"]

    shutil.copytree(last, finished / "step-00000012.replaced")
    bring_back_replaced(finished)
    assert (finished / "step-00000012.replaced").exists(), "its successor is there"


@pytest.mark.slow
def test_another_run_that_began_in_a_new_folder_meanwhile_is_not_trained_over(
    settings, finished, tmp_path, monkeypatch
):
    out_dir = tmp_path / "new"
    build = setup.build_optimizer

    def meanwhile(model, config):
        copied(finished, out_dir)
        return build(model, config)

    monkeypatch.setattr(setup, "build_optimizer", meanwhile)
    before = read_manifest(finished / "final")
    with pytest.raises(CheckpointError, match="another run began in .*new meanwhile; add --resume=auto"):
        pretrain(**settings(out_dir=out_dir))
    assert read_manifest(out_dir / "final") == before


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_began_when_it_began(settings, rows, monkeypatch):
    arguments = settings(train={"save_interval": None}, resume="auto")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(**arguments)
    pretrain(**arguments)
    state = json.loads((arguments["out_dir"] / "final" / "state.json").read_text())["state"]
    first, second = rows(arguments["out_dir"], "start")
    assert (state["begun_at"], state["restarts"]) == (first["time"], 1)
    assert second["time"] > first["time"]


@pytest.mark.slow
@pytest.mark.parametrize("log_interval", [1, 4, 5])
def test_lines_after_a_resume_are_of_all_their_steps(settings, rows, monkeypatch, tmp_path, log_interval):
    train = {"log_interval": log_interval}
    pretrain(**settings(out_dir=tmp_path / "whole", train=train))
    parts = settings(out_dir=tmp_path / "parts", train=train, resume="auto")
    for step in (2, 7):
        run_and_stop(monkeypatch, step, parts)
    pretrain(**parts)
    whole = {row["step"]: row["loss"] for row in rows(tmp_path / "whole")}
    assert {row["step"]: row["loss"] for row in rows(tmp_path / "parts")} == whole


@pytest.mark.slow
def test_skips_between_two_log_lines_are_seen(settings, rows, monkeypatch):
    poison(monkeypatch, range(5, 8))
    arguments = settings(guard=GuardConfig(max_skips=3, window=3), train={"log_interval": 12})
    pretrain(**arguments)
    assert [row["path"] for row in rows(arguments["out_dir"], "rewind")] == ["step-00000004"]


@pytest.mark.slow
def test_a_rewind_takes_the_checkpoint_with_the_fewest_skips_where_none_is_without(settings, rows, monkeypatch):
    poison(monkeypatch, range(1, 10, 2))
    arguments = settings(guard=GuardConfig(max_skips=4, window=100), train={"save_interval": 2})
    pretrain(**arguments)
    assert [row["path"] for row in rows(arguments["out_dir"], "rewind")] == ["step-00000002"]


def test_a_run_that_could_take_no_step_is_not_done(settings, monkeypatch):
    poison(monkeypatch, range(12))
    arguments = settings(guard=GuardConfig(max_skips=100))
    with pytest.raises(TrainingError, match="not one of 12 steps was taken, for no gradient was finite"):
        pretrain(**arguments)
    assert not (arguments["out_dir"] / "final").exists()


@pytest.mark.slow
def test_the_first_save_is_given_time_by_its_size_and_later_ones_by_the_last(settings, monkeypatch):
    seen = []
    step = loop._step

    def watched(run, *rest):
        step(run, *rest)
        seen.append(run.save_seconds)

    monkeypatch.setattr(loop, "_step", watched)
    pretrain(**settings(train={"max_steps": 6}, checkpoint=CheckpointConfig(asynchronous=False)))
    assert seen[:4] == [pytest.approx(3 * 4 * 24_736 / 2e8, rel=0.1)] * 4  # the rotary tables are no parameters
    assert seen[4] == seen[5] > 0
    state = json.loads((Path(settings()["out_dir"]) / "final" / "state.json").read_text())["state"]
    assert state["save_seconds"] == seen[5]
