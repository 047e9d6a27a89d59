"""Where a run reads and writes: what cannot be is refused, by a dry run as by the run itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from pretrainkit.config import ComputeConfig, DataConfig
from pretrainkit.errors import CheckpointError, ConfigError, StorageError
from pretrainkit.train import pretrain

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", ["", "train", "train/run", "val"])
def test_a_run_does_not_write_among_a_datasets_chunks(settings, dataset, name, dry_run):
    before = sorted(dataset.rglob("*"))
    with pytest.raises(
        ConfigError, match=f"out_dir={dataset / name} is in the dataset {dataset}; give a folder beside"
    ):
        pretrain(**settings(out_dir=dataset / name, dry_run=dry_run))
    assert sorted(dataset.rglob("*")) == before


def test_a_run_beside_the_splits_is_taken(settings, dataset):
    pretrain(**settings(out_dir=dataset / "run", dry_run=True))


def test_one_dataset_under_two_names_is_refused(settings, dataset):
    sources = {str(dataset): 1.0, f"{dataset}/train": 1.0}
    with pytest.raises(ConfigError, match="data.sources names one dataset twice, as .* and as .*/train; leave one out"):
        pretrain(**settings(dataset_path=None, data=DataConfig(sources=sources)))


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_a_run_cannot_go_on_from_is_refused(settings, tmp_path, dry_run):
    with pytest.raises(CheckpointError, match="nowhere"):
        pretrain(**settings(resume=tmp_path / "nowhere", dry_run=dry_run))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint to resume; use --resume=auto to begin"):
        pretrain(**settings(resume=True, dry_run=dry_run))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_holds_results_is_refused(settings, dry_run):
    arguments = settings(dry_run=dry_run)
    step = arguments["out_dir"] / "step-00000004"
    step.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds step-00000004, which is of no run and would be replaced"):
        pretrain(**arguments)
    (arguments["out_dir"] / "metrics.jsonl").touch()
    (step / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"already holds a run \(step-00000004\); add --resume=auto"):
        pretrain(**arguments)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_cannot_be_made_is_refused(settings, tmp_path, dry_run):
    (tmp_path / "file").touch()
    for out_dir, why in (("/proc/x", "a folder on the way is gone or cannot be made|no permission"),
                         (tmp_path / "file" / "run", "a part of the path is a file")):  # fmt: skip
        with pytest.raises(StorageError, match=f"cannot write {out_dir}.*({why})"):
            pretrain(**settings(out_dir=Path(out_dir), dry_run=dry_run))


@pytest.mark.parametrize("dry_run", [False, True])
def test_float8_on_a_cpu_is_refused(settings, dry_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    compute = ComputeConfig(float8=True, hang_timeout_s=None)
    with pytest.raises(ConfigError, match="compute.float8 needs a GPU of compute capability 8.9"):
        pretrain(**settings(compute=compute, dry_run=dry_run))


def test_a_run_without_an_end_in_sight_is_planned_and_trained(settings, caplog):
    limits = {"max_steps": 2**63 - 1, "lr_warmup_steps": 2}
    with caplog.at_level(logging.INFO):
        pretrain(**settings(dry_run=True, train=limits))
        assert "about more than a year on 1 x" in caplog.text
        caplog.clear()
        pretrain(**settings(train=limits | {"max_time": 1.0, "log_interval": 1, "save_interval": None}))
    assert "time is up after step" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(settings, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("pretrainkit.train.parallel.initialize_parameters", fail)
    with pytest.raises(
        ConfigError, match="the model's weights do not fit into the memory of a rank's device; --dry_run"
    ):
        pretrain(**settings())


def test_a_bug_in_filling_the_weights_keeps_its_traceback(settings, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("pretrainkit.train.parallel.initialize_parameters", fail)
    with pytest.raises(RuntimeError, match="^a bug$"):
        pretrain(**settings())
