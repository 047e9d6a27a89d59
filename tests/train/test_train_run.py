"""A whole run on one CPU process: what it writes, that it learns, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from pretrainkit.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    GuardConfig,
    LossConfig,
    OptimizerArgs,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)
from pretrainkit.errors import CheckpointError, ConfigError, DatasetError, Interrupted, StorageError, TrainingError
from pretrainkit.locks import folder_lock
from pretrainkit.train import checkpoint, loop, parallel, pretrain
from pretrainkit.train.manifest import MANIFEST_FILENAME
from pretrainkit.train.setup import train_process

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM, *, rewinds: int = 0) -> None:
    """Send this process a signal while that step is computed, after so many rewinds."""
    whole = loop._step

    def interrupted(run, *rest):
        whole(run, *rest)
        if (run.state.step, run.state.rewinds) == (step, rewinds):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "_step", interrupted)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = folder.with_name(f"{folder.name}.pt")
    dcp_to_torch_save(folder / "lit_model.pth", file)
    loaded = torch.load(file, weights_only=True)
    return {
        f"{part}.{name}": tensor for part in ("model", "optimizer") for name, tensor in flatten(loaded[part]).items()
    }


def flatten(tree: dict) -> dict[str, torch.Tensor]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            {f"{name}.{key}": inner for key, inner in flatten(value).items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def assert_equal_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_learns_and_leaves_what_the_design_says(settings, rows):
    arguments = settings(eval={"interval": 5, "initial_validation": True, "final_validation": True})
    pretrain(**arguments)
    run = arguments["out_dir"]

    train = rows(run)
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["tokens"] for row in train] == [512 * step for step in range(1, 13)]
    assert train[0]["loss"] == pytest.approx(4.2, abs=0.3)  # ln 64
    assert train[-1]["loss"] < 3.4
    assert {"learning_rate", "grad_norm", "tokens_per_s", "memory_gb", "data_wait", "remaining_s", "goodput", "digest",
            "tokens_per_s_per_device"} <= train[0].keys()  # fmt: skip
    validation = rows(run, "validation")
    assert [row["step"] for row in validation] == [0, 5, 10, 12]
    assert validation[-1]["val_loss"] < validation[0]["val_loss"]
    # 3 bytes per token
    assert validation[0]["val_bits_per_byte"] == pytest.approx(validation[0]["val_loss"] / 0.6931472 / 3, rel=1e-5)

    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "config.yaml", "final", "metrics.jsonl", "step-00000004", "step-00000008", "step-00000012",
    ]  # fmt: skip
    files = {path.relative_to(run / "final").as_posix() for path in (run / "final").rglob("*") if path.is_file()}
    assert files == {
        "lit_model.pth/.metadata", "lit_model.pth/__0_0.distcp", "lit_model.pth/meta.pt", "manifest.json",
        "model_config.yaml", "state.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 12
    assert yaml.safe_load((run / "final" / "model_config.yaml").read_text())["n_embd"] == 32


def test_the_result_loads_strictly_into_litgpt_and_lightnings_tool_reads_it(settings):
    from lightning.fabric.utilities.load import _load_distributed_checkpoint
    from litgpt import GPT, Config

    arguments = settings(train={"max_steps": 2})
    pretrain(**arguments)
    final = arguments["out_dir"] / "final"
    loaded = _load_distributed_checkpoint(final / "lit_model.pth")
    GPT(Config.from_file(final / "model_config.yaml")).load_state_dict(loaded["model"], strict=True)


def test_training_equals_a_plain_litgpt_loop(settings, rows, dataset):
    """The same model, data and optimizer written out by hand: accumulation, clipping, schedule."""
    from litgpt import GPT, Config

    from pretrainkit.config import LossConfig
    from pretrainkit.models import build_model, initialize_parameters, resolve_config
    from pretrainkit.stream import BlockLoader, open_sources

    arguments = settings(train={"max_steps": 4, "max_norm": 0.5})
    pretrain(**arguments)

    config = resolve_config(None, arguments["model_config"])
    seeded = build_model(config, loss=LossConfig())
    initialize_parameters(seeded, 42)
    model = GPT(Config(**arguments["model_config"]))
    model.load_state_dict(seeded.state_dict())
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and "wte" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "wte" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    loader = BlockLoader(open_sources({str(dataset): 1.0}, "train", 32), micro_batch_size=16, global_batch_size=16)
    for row, rate in zip(rows(arguments["out_dir"]), (0.005, 0.01, 0.00505, 0.0001), strict=True):
        tokens = next(loader)["tokens"]
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits_with_a_code_to_requeue_on(settings, monkeypatch, number, code):
    stop_at(monkeypatch, step=3, number=number)
    arguments = settings()
    with pytest.raises(Interrupted, match="after step 3; saved, go on with --resume=auto") as caught:
        pretrain(**arguments)
    assert caught.value.exit_code == code
    assert (arguments["out_dir"] / "step-00000003" / MANIFEST_FILENAME).is_file()
    assert not (arguments["out_dir"] / "final").exists()


@pytest.mark.parametrize("document_mask", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopping_and_going_on_gives_the_same_bits(settings, rows, monkeypatch, tmp_path, document_mask):
    data = DataConfig(document_mask=document_mask, num_workers=0 if document_mask else 1)
    whole = settings(data=data, out_dir=tmp_path / "whole")
    pretrain(**whole)

    parts = settings(data=data, out_dir=tmp_path / "parts", resume="auto")
    with monkeypatch.context() as patched:
        stop_at(patched, step=6)
        with pytest.raises(Interrupted):
            pretrain(**parts)
    pretrain(**parts)

    keys = ("step", "loss", "grad_norm", "learning_rate", "digest", "tokens")
    first, second = ([{key: row[key] for key in keys} for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert first == second
    assert_equal_weights(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


@pytest.mark.slow
def test_resume_passes_over_a_damaged_checkpoint_and_says_so(settings, rows, monkeypatch, tmp_path, caplog):
    whole = settings(out_dir=tmp_path / "whole")
    pretrain(**whole)

    parts = settings(out_dir=tmp_path / "parts", resume="auto")
    with monkeypatch.context() as patched:
        stop_at(patched, step=10)
        with pytest.raises(Interrupted):
            pretrain(**parts)
    shard = tmp_path / "parts" / "step-00000010" / "lit_model.pth" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    caplog.clear()
    with caplog.at_level(logging.INFO):
        pretrain(**parts)
    assert "passed over a damaged checkpoint" in caplog.text
    assert "step-00000010: lit_model.pth/__0_0.distcp is not what was saved" in caplog.text
    assert "step-00000008, after step 8" in caplog.text
    assert rows(tmp_path / "parts")[-1]["loss"] == rows(tmp_path / "whole")[-1]["loss"]
    assert_equal_weights(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


@pytest.mark.slow
def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(settings, rows, caplog):
    arguments = settings(train={"max_steps": 4}, schedule=ScheduleConfig(name="constant"), resume="auto")
    pretrain(**arguments)
    before = (arguments["out_dir"] / "metrics.jsonl").read_text()
    with caplog.at_level(logging.INFO):
        pretrain(**arguments)
    assert "this run is finished" in caplog.text
    assert (arguments["out_dir"] / "metrics.jsonl").read_text() == before

    longer = settings(train={"max_steps": 6}, schedule=ScheduleConfig(name="constant"), resume="auto")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pretrain(**longer)
    assert "changed since that checkpoint: train.max_steps: 4 -> 6" in caplog.text
    assert [row["step"] for row in rows(arguments["out_dir"])] == [1, 2, 3, 4, 5, 6]
    assert json.loads((arguments["out_dir"] / "final" / "state.json").read_text())["state"]["step"] == 6
    assert (arguments["out_dir"] / "final-00000004" / MANIFEST_FILENAME).is_file()


@pytest.mark.slow
def test_a_folder_with_a_run_is_not_overwritten(settings):
    arguments = settings(train={"max_steps": 1})
    pretrain(**arguments)
    with pytest.raises(CheckpointError, match="already holds a run .*; add --resume=auto"):
        pretrain(**arguments)


def test_resuming_nothing_and_resuming_another_model_are_refused(settings):
    with pytest.raises(CheckpointError, match="holds no whole checkpoint to resume"):
        pretrain(**settings(resume=True))
    pretrain(**settings(train={"max_steps": 1}))
    other = settings(resume="auto")
    other["model_config"] |= {"n_layer": 3}
    with pytest.raises(CheckpointError, match="is of another model .*n_layer: 2 -> 3"):
        pretrain(**other)


@pytest.mark.slow
def test_only_the_last_checkpoints_and_every_nth_are_kept(settings):
    from pretrainkit.config import CheckpointConfig

    kept = CheckpointConfig(keep_last=2, keep_every=4)
    arguments = settings(train={"save_interval": 1, "max_steps": 11}, checkpoint=kept)
    pretrain(**arguments)
    names = sorted(path.name for path in arguments["out_dir"].glob("step-*"))
    assert names == ["step-00000004", "step-00000008", "step-00000010", "step-00000011"]


@pytest.mark.slow
def test_max_time_leaves_room_for_the_save_and_the_run_can_go_on(settings, rows):
    arguments = settings(train={"max_steps": 100_000, "max_time": 3.0, "log_interval": 50, "save_interval": None})
    pretrain(**arguments)
    (end,) = rows(arguments["out_dir"], "end")
    assert 0 < end["step"] < 100_000
    assert all(0 <= row["remaining_s"] < 3.0 for row in rows(arguments["out_dir"]))
    assert (arguments["out_dir"] / "final" / MANIFEST_FILENAME).is_file()


def test_max_time_counts_from_where_the_command_began(settings, rows):
    """Importing PyTorch is part of it, which takes half a minute from a shared disk."""
    arguments = settings(train={"max_steps": 100_000, "max_time": 900.0, "save_interval": None})
    train_process(PretrainConfig(**arguments), time.monotonic() - 1000.0)
    assert rows(arguments["out_dir"], "end")[0]["step"] <= 2


def poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the gradients of these data steps infinite."""
    whole = loop.gradient_norm

    def poisoned(optimizers):
        norm = whole(optimizers)
        return norm * torch.inf if poisoned.run.state.data_step in steps else norm

    step = loop._step

    def remember(run, *rest):
        poisoned.run = run
        step(run, *rest)

    monkeypatch.setattr(loop, "gradient_norm", poisoned)
    monkeypatch.setattr(loop, "_step", remember)


def test_a_bad_step_is_skipped_and_training_goes_on(settings, rows, monkeypatch, caplog):
    poison(monkeypatch, range(5, 6))
    arguments = settings()
    pretrain(**arguments)
    train = rows(arguments["out_dir"])
    assert [row["step"] for row in train if row["skipped"]] == [6]
    assert "step 6: 1 step(s) skipped" in caplog.text
    assert train[-1]["loss"] < 3.5


@pytest.mark.slow
def test_many_bad_steps_rewind_to_the_last_good_checkpoint_and_past_the_bad_data(settings, rows, monkeypatch):
    poison(monkeypatch, range(5, 8))
    arguments = settings(guard=GuardConfig(max_skips=3))
    pretrain(**arguments)
    (rewind,) = rows(arguments["out_dir"], "rewind")
    assert (rewind["path"], rewind["step"], rewind["samples"]) == ("step-00000004", 4, 8 * 16)
    steps = [row["step"] for row in rows(arguments["out_dir"])]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10, 11, 12]
    state = json.loads((arguments["out_dir"] / "final" / "state.json").read_text())["state"]
    assert (state["step"], state["data_step"], state["rewinds"]) == (12, 16, 1)


@pytest.mark.slow
def test_a_rewind_passes_over_a_damaged_checkpoint(settings, rows, monkeypatch, caplog):
    poison(monkeypatch, range(5, 8))
    arguments = settings(guard=GuardConfig(max_skips=3), train={"save_interval": 2})
    rewind = loop._rewind

    def after_damage(run, most_skips):
        run.checkpoints.wait()
        tensors = next((arguments["out_dir"] / "step-00000004" / "lit_model.pth").glob("*.distcp"))
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
        return rewind(run, most_skips)

    monkeypatch.setattr(loop, "_rewind", after_damage)
    pretrain(**arguments)
    assert "passed over a damaged checkpoint" in caplog.text
    assert [row["path"] for row in rows(arguments["out_dir"], "rewind")] == ["step-00000002"]


def test_a_folder_in_which_another_run_trains_is_left_alone(settings, monkeypatch):
    monkeypatch.setattr("pretrainkit.train.setup._HOLDER_GRACE_S", 0.0)
    arguments = settings()
    partial = arguments["out_dir"] / "step-00000004.partial"
    partial.mkdir(parents=True)
    (arguments["out_dir"] / "metrics.jsonl").touch()
    with folder_lock(arguments["out_dir"], "train"), pytest.raises(StorageError, match="is in use by another process"):
        pretrain(**arguments, resume="auto")
    assert sorted(path.name for path in arguments["out_dir"].iterdir()) == [".lock", "metrics.jsonl", partial.name]
    pretrain(**arguments, resume="auto")
    assert (arguments["out_dir"] / "final" / MANIFEST_FILENAME).is_file()


@pytest.mark.parametrize("name", ["final/lit_model.pth", "step-00000004/lit_model.pth", "config.yaml"])
@pytest.mark.parametrize("resume", [False, "auto"])
def test_what_another_program_left_in_the_folder_is_not_replaced(settings, name, resume):
    arguments = settings(resume=resume)
    theirs = arguments["out_dir"] / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("litgpt's")
    with pytest.raises(CheckpointError, match=f"holds {Path(name).parts[0]}, which is of no run"):
        pretrain(**arguments)
    assert [path for path in arguments["out_dir"].rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "litgpt's"


@pytest.mark.slow
def test_a_checkpoint_brought_into_a_new_folder_goes_on(settings, tmp_path):
    pretrain(**settings(out_dir=tmp_path / "first"))
    shutil.copytree(tmp_path / "first" / "step-00000008", tmp_path / "moved" / "step-00000008")
    shutil.copy(tmp_path / "first" / "config.yaml", tmp_path / "moved")
    pretrain(**settings(out_dir=tmp_path / "moved", resume=True))
    assert weights(tmp_path / "moved" / "final").keys() == weights(tmp_path / "first" / "final").keys()


@pytest.mark.slow
def test_a_run_stopped_after_a_rewind_goes_on_from_there_and_not_from_before(settings, rows, monkeypatch):
    poison(monkeypatch, range(5, 8))
    arguments = settings(guard=GuardConfig(max_skips=3), resume="auto", train={"save_interval": 2})
    with monkeypatch.context() as patched:
        stop_at(patched, step=5, rewinds=1)
        with pytest.raises(Interrupted, match="after step 5; saved"):
            pretrain(**arguments)
    checkpoints = sorted(path.name for path in arguments["out_dir"].glob("step-*"))
    assert checkpoints[-1] == "step-00000005"
    pretrain(**arguments)
    (resumed,) = rows(arguments["out_dir"], "resume")
    assert (resumed["step"], resumed["samples"]) == (5, 9 * 16)
    assert len(rows(arguments["out_dir"], "rewind")) == 1
    state = json.loads((arguments["out_dir"] / "final" / "state.json").read_text())["state"]
    assert (state["step"], state["data_step"], state["rewinds"]) == (12, 16, 1)


@pytest.mark.parametrize("name", ["", "config.yaml", "metrics.jsonl"])
def test_a_file_where_a_folder_belongs_and_the_reverse_are_one_line(settings, tmp_path, name):
    if name:
        (tmp_path / "run" / name).mkdir(parents=True)
    else:
        (tmp_path / "run").write_text("mine")
    with pytest.raises(StorageError, match="lies where a folder belongs|lies where the file belongs"):
        pretrain(**settings(out_dir=tmp_path / "run"))
    assert (tmp_path / "run" / name).exists()


def test_nothing_but_bad_steps_ends_the_run_with_one_line(settings, monkeypatch):
    poison(monkeypatch, range(1000))
    with pytest.raises(TrainingError, match="3 of 100 steps were skipped before step 3, and there is no checkpoint"):
        pretrain(**settings(guard=GuardConfig(max_skips=3)))


@pytest.mark.slow
def test_muon_trains_and_resumes(settings, rows, monkeypatch, tmp_path):
    muon = OptimizerConfig(class_path="Muon", init_args=OptimizerArgs(lr=1e-2))
    pretrain(**settings(optimizer=muon, out_dir=tmp_path / "whole"))
    parts = settings(optimizer=muon, out_dir=tmp_path / "parts", resume="auto")
    with monkeypatch.context() as patched:
        stop_at(patched, step=6)
        with pytest.raises(Interrupted):
            pretrain(**parts)
    pretrain(**parts)
    assert rows(tmp_path / "whole")[-1]["loss"] == rows(tmp_path / "parts")[-1]["loss"] < 3.8


@pytest.mark.slow
def test_wsd_decays_from_a_stable_checkpoint_over_unseen_data(settings, rows, tmp_path):
    stable = settings(schedule=ScheduleConfig(name="constant"), train={"max_steps": 4}, out_dir=tmp_path / "stable")
    pretrain(**stable)
    decay = ScheduleConfig(name="wsd", decay_from=tmp_path / "stable" / "final")
    pretrain(**settings(schedule=decay, train={"max_steps": 4}, out_dir=tmp_path / "decay"))
    assert [row["learning_rate"] for row in rows(tmp_path / "decay")] == pytest.approx(
        [0.007525, 0.00505, 0.002575, 1e-4]
    )
    state = json.loads((tmp_path / "decay" / "final" / "state.json").read_text())["state"]
    assert (state["step"], state["data_step"], state["samples"]) == (4, 8, 128)


@pytest.mark.slow
def test_initial_weights_come_from_a_checkpoint_or_a_litgpt_file(settings, rows, tmp_path):
    pretrain(**settings(out_dir=tmp_path / "first"))
    last = rows(tmp_path / "first")[-1]["loss"]
    final = tmp_path / "first" / "final"
    folder = tmp_path / "litgpt"
    folder.mkdir()
    model = {name.removeprefix("model."): value for name, value in weights(final).items() if name.startswith("model.")}
    torch.save(model, folder / "lit_model.pth")
    for index, source in enumerate((final, folder)):
        arguments = settings(initial_checkpoint_dir=source, train={"max_steps": 1}, out_dir=tmp_path / str(index))
        pretrain(**arguments)
        assert rows(arguments["out_dir"])[0]["loss"] == pytest.approx(last, abs=0.3)
    torch.save({"x": torch.zeros(1)}, folder / "lit_model.pth")
    with pytest.raises(CheckpointError, match="is of another model: lm_head.weight is not in it"):
        pretrain(**settings(initial_checkpoint_dir=folder, out_dir=tmp_path / "refused"))


@pytest.mark.parametrize("content", [[1, 2], {"lm_head.weight": 3}])
def test_a_file_of_something_else_is_no_checkpoint_to_begin_with(settings, tmp_path, content):
    torch.save(content, tmp_path / "lit_model.pth")
    with pytest.raises(CheckpointError, match="holds no tensors by name; give a checkpoint"):
        pretrain(**settings(initial_checkpoint_dir=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["attention", "mlp", "block"])
def test_checkpointing_activations_changes_no_bit(settings, rows, tmp_path, what):
    from pretrainkit.config import ComputeConfig

    compute = ComputeConfig(hang_timeout_s=None, activation_checkpointing=what)
    pretrain(**settings(train={"max_steps": 2}, out_dir=tmp_path / "plain"))
    pretrain(**settings(train={"max_steps": 2}, out_dir=tmp_path / what, compute=compute))
    assert [r["grad_norm"] for r in rows(tmp_path / "plain")] == [r["grad_norm"] for r in rows(tmp_path / what)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains(settings, rows, precision):
    arguments = settings(precision=precision, train={"tie_embeddings": True, "max_steps": 8})
    pretrain(**arguments)
    assert rows(arguments["out_dir"])[-1]["loss"] < 4.0
    stored = weights(arguments["out_dir"] / "final")["model.transformer.h.0.attn.qkv.weight"].dtype
    assert stored == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


@pytest.mark.slow
def test_masters_change_no_bit_of_a_run_that_is_stopped_and_begins_with_given_weights(
    settings, rows, monkeypatch, tmp_path
):
    pretrain(**settings(out_dir=tmp_path / "first", train={"max_steps": 2}))
    common = {"precision": "bf16-mixed", "initial_checkpoint_dir": tmp_path / "first" / "final",
              "eval": {"interval": 4, "final_validation": True}}  # fmt: skip
    whole = settings(out_dir=tmp_path / "whole", **common)
    parts = settings(out_dir=tmp_path / "parts", **common)
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "keep_masters", lambda _model, _dtype: None)
        pretrain(**whole)
    with monkeypatch.context() as patched:
        stop_at(patched, step=6)
        with pytest.raises(Interrupted):
            pretrain(**parts)
    pretrain(**parts | {"initial_checkpoint_dir": None, "resume": "auto"})
    for event, key in (("train", "loss"), ("train", "grad_norm"), ("validation", "val_loss")):
        expected, found = ([row[key] for row in rows(tmp_path / name, event)] for name in ("whole", "parts"))
        assert found == expected
    assert_equal_weights(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


@pytest.mark.slow
def test_samples_and_csv(settings, rows, caplog):
    arguments = settings(
        eval={"final_validation": True, "prompts": ["The quick"], "max_new_tokens": 4}, logger_name="csv"
    )
    arguments["model_config"] |= {"vocab_size": 512}
    pretrain(**arguments)
    (row,) = rows(arguments["out_dir"], "validation")
    assert row["samples"]["The quick"].startswith("The quick")
    lines = (arguments["out_dir"] / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,name,value"
    assert any(line.startswith("12,loss,") for line in lines)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tokenizer_that_does_not_fit_is_refused_before_training(settings, tokenizer_dir, tmp_path, dry_run):
    # The dataset's text has ids below 64, the tokenizer beside it up to 511.
    for values in ({"eval": {"prompts": ["The quick"]}}, {"tokenizer_dir": tokenizer_dir}):
        with pytest.raises(ConfigError, match="gives ids up to 511, but the model has embeddings for 64"):
            pretrain(**settings(dry_run=dry_run, **values))
    (tmp_path / "tokenizer").mkdir()
    for name, message in (("tokenizer.model", "needs a tokenizer.json"), ("tokenizer.json", "cannot be read")):
        (tmp_path / "tokenizer" / name).write_text("{")
        with pytest.raises(ConfigError, match=message):
            pretrain(**settings(dry_run=dry_run, tokenizer_dir=tmp_path / "tokenizer", eval={"prompts": ["The quick"]}))


@pytest.mark.slow
def test_a_mixture_counts_the_tokens_of_each_source(settings, rows, dataset):
    twin = dataset.parent / "twin"
    if not twin.exists():
        twin.symlink_to(dataset)
    arguments = settings(
        dataset_path=None, data=DataConfig(sources={str(dataset): 3, str(twin): 1}), train={"max_steps": 2}
    )
    pretrain(**arguments)
    assert rows(arguments["out_dir"])[-1]["tokens_per_source"] == {f"{dataset}/train": 768, f"{twin}/train": 256}


def test_a_dataset_that_does_not_fit_is_refused(settings):
    from pretrainkit.errors import DatasetError, ModelError

    small = settings()
    small["model_config"] |= {"vocab_size": 32, "padding_multiple": 32}
    with pytest.raises(ModelError, match="ids reach 63, but tiny has embeddings for 32"):
        pretrain(**small)
    with pytest.raises(DatasetError, match="holds no dataset"):
        pretrain(**settings(dataset_path="nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize(("split", "damage"), [("train", "cut"), ("val", "gone")])
def test_a_chunk_that_a_run_would_only_come_to_later_is_named_at_its_start(settings, dataset, tmp_path, split, damage):
    data = shutil.copytree(dataset, tmp_path / "data")
    chunk = data / split / "chunk-0-1.bin"
    if damage == "cut":
        os.truncate(chunk, chunk.stat().st_size - 2)
    else:
        chunk.unlink()
    arguments = settings(dataset_path=str(data), eval={"final_validation": True})
    with pytest.raises(DatasetError, match="chunk-0-1.bin (has .* bytes, its index says|is missing)"):
        pretrain(**arguments)
    assert not arguments["out_dir"].exists()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_said_and_training_goes_on(settings, rows, monkeypatch, caplog, asynchronous):
    whole = checkpoint.write_manifest

    def full(folder, step, files):
        if step == 4:
            raise OSError(28, "No space left on device", str(folder))
        whole(folder, step, files)

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    arguments = settings(checkpoint=CheckpointConfig(asynchronous=asynchronous))
    pretrain(**arguments)
    assert "a checkpoint could not be saved: cannot write" in caplog.text
    assert "the disk is full" in caplog.text
    assert not list(arguments["out_dir"].glob("step-00000004*")), "half a checkpoint keeps a full disk full"
    assert (arguments["out_dir"] / "final" / MANIFEST_FILENAME).is_file()


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_no_block_holds_is_said_once(settings, caplog, dry_run):
    arguments = settings(dry_run=dry_run, train={"max_seq_length": 2999, "max_steps": 1, "global_batch_size": 4})
    arguments["model_config"]["block_size"] = 2999
    pretrain(**arguments)
    assert caplog.text.count("10.0 % of its tokens lie at chunk ends that fill no block of 3000") == 1


def test_dry_run_says_what_it_would_cost_and_writes_nothing(settings, caplog):
    arguments = settings(dry_run=True)
    with caplog.at_level(logging.INFO):
        pretrain(**arguments)
    assert "tiny: 24,736 parameters" in caplog.text
    assert "12 steps = 6,144 tokens" in caplog.text
    assert not arguments["out_dir"].exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_a_run_cannot_begin_with_is_refused_before_there_is_a_model(settings, monkeypatch, dry_run):
    monkeypatch.setattr("pretrainkit.train.setup.new_model", lambda *_: pytest.fail("was built"))
    for values, message in (
        ({"initial_checkpoint_dir": Path("nowhere")}, r"nowhere has no lit_model\.pth"),
        ({"schedule": ScheduleConfig(name="wsd", decay_from=Path("nowhere"))}, r"nowhere has no lit_model\.pth"),
        ({"compute": ComputeConfig(replicas=3)}, r"compute\.replicas=3 does not divide the 1 ranks"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            pretrain(**settings(dry_run=dry_run, **values))


def test_dry_run_refuses_what_cannot_fit_and_names_the_flag(settings):
    arguments = settings(
        dry_run=True, devices=8, num_nodes=8, launcher="auto", train={"global_batch_size": 64, "micro_batch_size": 1}
    )
    arguments["model_config"] |= {"n_layer": 96, "n_embd": 12288, "n_head": 96, "intermediate_size": 49152}
    with pytest.raises(ConfigError, match=r"a rank needs about [\d.]+ GB, .* has 80.00 GB; use compute.replicas=1 \("):
        pretrain(**arguments)


@pytest.mark.parametrize(
    ("devices", "way"),
    [
        (8, "more devices or nodes, or a smaller model"),
        (16, "compute.activation_checkpointing=block and precision=bf16-true"),
    ],
)
def test_dry_run_advises_only_what_makes_a_model_of_70_billion_fit(settings, devices, way):
    sizes = {"global_batch_size": devices, "micro_batch_size": 1}
    arguments = settings(dry_run=True, devices=devices, train=sizes | {"max_seq_length": 2048})
    arguments["model_config"] |= {"block_size": 8192, "n_layer": 80, "n_embd": 8192, "n_head": 64,
                                  "n_query_groups": 8, "intermediate_size": 28672}  # fmt: skip
    with pytest.raises(ConfigError, match=rf"has 80.00 GB; use {way}$"):
        pretrain(**arguments)


def test_dry_run_counts_the_whole_gradients_that_accumulation_keeps(settings, caplog):
    arguments = settings(dry_run=True, devices=8, train={"global_batch_size": 64, "micro_batch_size": 4})
    arguments["model_config"] |= {"n_layer": 50, "n_embd": 5120, "n_head": 40, "intermediate_size": 13824}
    with pytest.raises(ConfigError, match=r"use train.micro_batch_size=8 \(without accumulation"):
        pretrain(**arguments)
    train = {"global_batch_size": 64, "micro_batch_size": 8}
    with caplog.at_level(logging.INFO):
        pretrain(**(arguments | {"train": settings(train=train)["train"]}))
    assert "gradients 7.93 GB, optimizer 15.86 GB" in caplog.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "4.00 GB"),  # a twentieth of the GPU
        ({"loss": LossConfig(chunk_tokens=4096)}, "2.10 GB"),  # 4,096 x 128,256 logits, and gradients, of 2 bytes
        ({"loss": LossConfig(chunk_tokens=1 << 20)}, "4.20 GB"),  # all of 8 blocks of 1,024
        ({"loss": LossConfig(chunk_tokens=4096), "compute": ComputeConfig(compile=False)}, "8.41 GB"),
    ],
)
def test_dry_run_counts_a_chunk_of_logits(settings, caplog, values, expected):
    arguments = settings(dry_run=True, devices=2, train={"global_batch_size": 16, "micro_batch_size": 8}, **values)
    arguments["model_config"] |= {"block_size": 1024, "vocab_size": 128256, "padded_vocab_size": 128256}
    with caplog.at_level(logging.INFO):
        pretrain(**arguments)
    assert f"logits {expected}" in caplog.text


def test_a_save_in_the_background_stays_on_its_ranks_gpu(settings, monkeypatch):
    chosen = []
    monkeypatch.setattr(checkpoint, "_current_gpu", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: chosen.append((gpu, threading.current_thread())))
    pretrain(**settings(train={"max_steps": 6}))
    assert [gpu for gpu, _ in chosen] == [3]
    assert chosen[0][1] is not threading.main_thread()
