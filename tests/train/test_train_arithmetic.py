"""Batch sizes, limits and learning rates: pure functions with exact values."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from pretrainkit.arguments import parse
from pretrainkit.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LossConfig,
    OptimizerArgs,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from pretrainkit.errors import ConfigError, DatasetError, LaunchError, StorageError
from pretrainkit.train import pretrain
from pretrainkit.train.arithmetic import accumulation_steps, plan_run
from pretrainkit.train.metrics import duration, train_line
from pretrainkit.train.schedule import Course, learning_rate, plan_course


def plan(schedule: ScheduleConfig = ScheduleConfig(), *, world_size: int = 2, num_blocks: int = 1000, **train):
    config = TrainConfig(**{"global_batch_size": 8, "micro_batch_size": 2, **train})
    return plan_run(config, schedule, world_size=world_size, block_size=10, num_blocks=num_blocks)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_tokens": 800}, 10),
        ({"max_tokens": 879}, 10),
        ({"epochs": 2}, 250),
        ({"epochs": 0.1}, 12),
        ({"max_tokens": 800, "max_steps": 7}, 7),
        ({"max_tokens": 800, "epochs": 1}, 10),
        ({"max_steps": 7, "max_time": 5.0}, 7),
        ({}, 125),
    ],
)
def test_the_smallest_limit_decides_the_steps(limits, steps):
    assert plan(**limits).total_steps == steps


def test_what_a_token_limit_leaves_over_is_said():
    assert plan(max_tokens=800).notes == ()
    assert plan(max_tokens=879).notes == (
        "train.max_tokens=879 is not a whole number of steps of 80; 79 stay untrained",
    )


def test_a_step_is_made_of_ranks_micro_batches_and_blocks():
    result = plan(max_steps=3)
    assert (result.accumulation, result.tokens_per_step, result.total_tokens) == (2, 80, 240)


@pytest.mark.parametrize(
    ("sizes", "nearest"), [((100, 4, 8), 96), ((5, 4, 2), 8), ((100, 3, 1), 99), ((513, 4, 32), 512), ((20, 4, 4), 16)]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(sizes, nearest):
    with pytest.raises(ConfigError, match=f"use {nearest} or change micro_batch_size"):
        accumulation_steps(*sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 79}, "less than one step of 80 tokens"),
        ({"epochs": 0.001}, "train.epochs=0.001 is less than one step"),
        ({"max_time": 9.0}, "schedule.name=cosine ends"),
    ],
)
def test_limits_below_one_step_or_without_an_end_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_less_data_than_one_step_is_refused():
    with pytest.raises(DatasetError, match="has 7 blocks of 10 tokens, less than one step"):
        plan(num_blocks=7)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 100}, 10),
        ({"max_steps": 100_000}, 2000),
        ({"max_steps": 100, "lr_warmup_steps": 3}, 3),
        ({"max_steps": 100, "lr_warmup_fraction": 0.25}, 25),
    ],
)
def test_warm_up(changes, steps):
    assert plan(**changes).warmup_steps == steps


def test_courses():
    def rates(name: str, **changes):
        course = Course(name=name, peak=1.0, floor=0.2, warmup_tokens=10, total_tokens=110, **changes)
        return [round(learning_rate(course, tokens), 6) for tokens in (1, 10, 60, 85, 110, 200)]

    assert rates("cosine") == [0.1, 1.0, 0.6, pytest.approx(0.317157, abs=1e-6), 0.2, 0.2]
    assert rates("linear") == [0.1, 1.0, 0.6, 0.4, 0.2, 0.2]
    assert rates("wsd", decay_fraction=0.5) == [0.1, 1.0, pytest.approx(0.927273, abs=1e-6), 0.563636, 0.2, 0.2]
    assert rates("constant") == [0.1, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_decaying_from_a_stable_checkpoint_decays_over_the_whole_run(tmp_path):
    schedule = ScheduleConfig(name="wsd", decay_from=tmp_path)
    planned = plan(schedule, max_steps=10)
    train = TrainConfig(min_lr=0.0)
    course = plan_course(planned, train, schedule, OptimizerConfig())
    peak = OptimizerConfig().init_args.lr
    assert [learning_rate(course, step * 80) / peak for step in (0, 5, 10)] == [1.0, 0.5, 0.0]


GROUPS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "optimizer.init_args": OptimizerArgs,
    "schedule": ScheduleConfig,
    "loss": LossConfig,
    "guard": GuardConfig,
    "checkpoint": CheckpointConfig,
    "compute": ComputeConfig,
    "data": DataConfig,
}


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("train", {"max_norm": -1}, "train.max_norm=-1 must be above 0"),
        ("train", {"max_tokens": 0}, "train.max_tokens=0 must be above 0"),
        ("train", {"max_steps": 0}, "train.max_steps=0 must be above 0"),
        ("train", {"max_time": 0}, "train.max_time=0 must be above 0"),
        ("train", {"epochs": 0}, "train.epochs=0 must be above 0"),
        ("train", {"epochs": math.nan}, "train.epochs=nan must be above 0"),
        ("train", {"global_batch_size": 0}, "train.global_batch_size=0 must be above 0"),
        ("train", {"micro_batch_size": 0}, "train.micro_batch_size=0 must be above 0"),
        ("train", {"global_batch_size": 9}, "train.global_batch_size=9 is not a multiple of micro_batch_size=4; use 8"),
        ("train", {"max_seq_length": 0}, "train.max_seq_length=0 must be above 0"),
        ("train", {"min_lr": -1e-5}, "train.min_lr=-1e-05 must not be negative"),
        ("train", {"log_interval": 0}, "train.log_interval=0 must be above 0"),
        ("train", {"save_interval": 0}, "train.save_interval=0 must be above 0"),
        ("train", {"lr_warmup_steps": -1}, "train.lr_warmup_steps=-1 must be above -1"),
        ("train", {"lr_warmup_fraction": 1.5}, "train.lr_warmup_fraction=1.5 must be between 0 and 1"),
        ("train", {"lr_warmup_fraction": 0.1, "lr_warmup_steps": 1}, "say the same thing; give one of them"),
        ("eval", {"interval": 0}, "eval.interval=0 must be above 0"),
        ("eval", {"max_iters": 0}, "eval.max_iters=0 must be above 0"),
        ("eval", {"max_new_tokens": 0}, "eval.max_new_tokens=0 must be above 0"),
        ("optimizer.init_args", {"lr": 0}, "optimizer.init_args.lr=0 must be above 0"),
        ("optimizer.init_args", {"lr": math.inf}, "optimizer.init_args.lr=inf must be above 0"),
        ("optimizer.init_args", {"weight_decay": -1}, "optimizer.init_args.weight_decay=-1 must not be negative"),
        ("optimizer.init_args", {"betas": (0.9, 1.0)}, "optimizer.init_args.betas=(0.9, 1.0) must each be in [0, 1)"),
        ("optimizer.init_args", {"eps": 0}, "optimizer.init_args.eps=0 must be above 0"),
        ("optimizer.init_args", {"momentum": 1}, "optimizer.init_args.momentum=1 must be in [0, 1)"),
        ("schedule", {"decay_fraction": 2}, "schedule.decay_fraction=2 must be between 0 and 1"),
        ("schedule", {"decay_from": Path("x")}, "schedule.decay_from belongs to schedule.name=wsd"),
        ("loss", {"z_loss": -1}, "loss.z_loss=-1 must not be negative"),
        ("loss", {"chunk_tokens": 0}, "loss.chunk_tokens=0 must be above 0"),
        ("guard", {"spike_factor": 1}, "guard.spike_factor=1 must be above 1"),
        ("guard", {"warmup_steps": -1}, "guard.warmup_steps=-1 must be above -1"),
        ("guard", {"max_skips": 0}, "guard.max_skips=0 must be above 0"),
        ("guard", {"max_skips": 200}, "guard.max_skips=200 cannot happen within guard.window=100 steps; use at most"),
        ("checkpoint", {"keep_last": 0}, "checkpoint.keep_last=0 must be above 0"),
        ("checkpoint", {"keep_every": 0}, "checkpoint.keep_every=0 must be above 0"),
        ("compute", {"replicas": 0}, "compute.replicas=0 must be above 0"),
        ("train", {"max_steps": 2**63}, "train.max_steps=9223372036854775808 must be at most 9223372036854775807"),
        ("train", {"max_tokens": 10**400}, "must be at most 9223372036854775807"),
        ("guard", {"window": 10**13}, "guard.window=10000000000000 must be between 1 and 1000000"),
        ("data", {"prefetch_batches": 10**9}, "data.prefetch_batches=1000000000 must be between 1 and 10000"),
        ("data", {"num_workers": 10**6}, "data.num_workers=1000000 must be between 0 and 256"),
        (
            "data",
            {"sources": {"d": 1, "./d/": 1}},
            "data.sources names one dataset twice, d and ./d/; add their weights",
        ),
        ("data", {"sources": {"": 1}}, "data.sources is empty; give a path"),
        ("compute", {"hang_timeout_s": 0.001}, "compute.hang_timeout_s=0.001 must be between 1 and 31536000"),
        ("compute", {"hang_timeout_s": 1e18}, "must be between 1 and 31536000; null waits for ever"),
        ("compute", {"hang_timeout_s": 0}, "compute.hang_timeout_s=0 must be between 1 and 31536000; null waits"),
        ("compute", {"peak_flops": -1}, "compute.peak_flops=-1 must be above 0"),
        ("data", {"sources": {"d": -1}}, "data.sources[d]=-1 must be above 0"),
        ("data", {"num_workers": -1}, "data.num_workers=-1 must be between 0 and 256"),
        ("data", {"prefetch_batches": 0}, "data.prefetch_batches=0 must be between 1 and 10000"),
    ],
)
def test_a_wrong_value_gets_one_line(group, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        GROUPS[group](**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": 0}, "devices=0 must be above 0"),
        ({"launcher": "local", "num_nodes": 2}, "launcher=local starts processes on this machine alone"),
        ({"dataset_path": ""}, "dataset_path is empty; give a path"),
        ({"out_dir": Path("x" * 300)}, "... is too long (300 characters); file systems take 255 bytes in a name"),
        ({"out_dir": Path("x/" * 2100)}, "file systems take 255 bytes in a name and 4095 in a path"),
        ({"out_dir": Path("a\0b")}, "has a zero byte in it"),
        ({"num_nodes": 0}, "num_nodes=0 must be above 0"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"train": TrainConfig(min_lr=1)}, "train.min_lr=1 is above optimizer.init_args.lr=0.0004"),
        ({"data": DataConfig(sources={"d": 1})}, "give either dataset_path or data.sources; both are given"),
        ({"dataset_path": None}, "give either dataset_path or data.sources; neither is given"),
        ({"model_name": None}, "no model: give --model_name"),
        ({"resume": True, "initial_checkpoint_dir": Path("x")}, "exclude each other"),
        ({"out_dir": Path("s3://bucket/run")}, "out_dir=s3:/bucket/run is a URL; training writes to a folder"),
    ],
)
def test_values_that_do_not_go_together_get_one_line_before_anything_starts(values, message, monkeypatch):
    monkeypatch.setattr("pretrainkit.launchers.launch", lambda *_: pytest.fail("was launched"))
    with pytest.raises((ConfigError, StorageError), match=re.escape(message)):
        pretrain(**{"model_name": "pythia-14m", "dataset_path": "d"} | values)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:S3CRET@bucket/data",
        "s3://KEY:S3C/RET@bucket/data",
        "https://S3CRET@host/data",
        "https://host/data?token=S3CRET",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_and_not_repeated(url):
    for make in (
        lambda: PretrainConfig(model_name="pythia-14m", dataset_path=url),
        lambda: DataConfig(sources={url: 1.0}),
        lambda: DataConfig(sources={url: -1.0}),  # whose own message would name the URL
    ):
        with pytest.raises(ConfigError, match="carries a password, key or token") as caught:
            make()
        assert "S3C" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/data", "abfs://container@account.host/data", "https://host:8080/data"])
def test_a_url_without_a_secret_is_taken(url):
    assert PretrainConfig(model_name="pythia-14m", dataset_path=url).sources == {url: 1.0}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--optimizer.class_path=os.system",
            "class_path=os.system does not fit; it takes one of torch.optim.AdamW, AdamW, Muon",
        ),
        ("--schedule.name=step", "--schedule.name=step does not fit; it takes one of cosine, linear, wsd, constant"),
        ("--trian.max_steps=1", "did you mean --train.max_steps"),
        ("--learning_rate=1", "unknown flag --learning_rate; did you mean --optimizer.init_args.lr?"),
        ("--train.lr=1", "unknown flag --train.lr; did you mean --optimizer.init_args.lr?"),
        ("--warmup_steps=1", "unknown flag --warmup_steps; did you mean --train.lr_warmup_steps?"),
        ("--devices=True", "--devices=True does not fit; it takes a whole number or auto"),
        (
            "--data.sources={s3://KEY:S3CRET@b/x: q}",
            "--data.sources={s3://***@b/x: q} does not fit; it takes a mapping",
        ),
        ("--train.max_norm=-1", "train.max_norm=-1.0 must be above 0"),
        ("--train.epochs=nan", "--train.epochs=nan does not fit; it takes a number or null"),
        ("--out_dir=", "--out_dir is empty; give a path"),
    ],
)
def test_a_wrong_flag_gets_one_line(flag, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(pretrain, ["--model_name=pythia-14m", "--dataset_path=d", flag])


def test_the_home_folder_is_meant_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = PretrainConfig(
        model_name="pythia-14m",
        out_dir=Path("~/run"),
        resume=Path("~/r"),
        tokenizer_dir=Path("~/t"),
        data=DataConfig(sources={"~/d": 1.0, "s3://b/~/d": 2.0}, cache_dir=Path("~/c")),
        schedule=ScheduleConfig(name="wsd", decay_from=Path("~/s")),
    )
    assert (config.out_dir, config.resume, config.tokenizer_dir) == (tmp_path / "run", tmp_path / "r", tmp_path / "t")
    assert config.data.sources == {f"{tmp_path}/d": 1.0, "s3://b/~/d": 2.0}
    assert (config.data.cache_dir, config.schedule.decay_from) == (tmp_path / "c", tmp_path / "s")
    beginning = PretrainConfig(model_name="m", dataset_path="~/d", initial_checkpoint_dir=Path("~/i"))
    assert (beginning.dataset_path, beginning.initial_checkpoint_dir) == (f"{tmp_path}/d", tmp_path / "i")
    same = (PretrainConfig(model_name="m", dataset_path="d", resume=value).resume for value in (True, False, "auto"))
    assert list(same) == [True, False, "auto"]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 2**63 - 1, "max_time": 5.0},
        {"max_steps": 10**15},
        {"max_tokens": 10**18},
        {"epochs": 1e18},
    ],
)
def test_as_many_steps_as_there_is_time_for(limits):
    steps = plan(**limits).total_steps
    names = ("step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_s", "tokens_per_s_per_device",
             "memory_gb", "data_wait")  # fmt: skip
    row = dict.fromkeys(names, 1) | {"remaining_s": (steps - 1) * 0.5}
    assert train_line(row, steps).endswith("| more than a year left")


def test_times_in_words():
    words = [duration(seconds) for seconds in (86_400, 365 * 86_400, 1e30)]
    assert words == ["1 day, 0:00:00", "365 days, 0:00:00", "more than a year"]


def test_more_processes_than_the_cpus_can_drive_are_refused_before_one_starts(monkeypatch):
    monkeypatch.setattr("pretrainkit.launchers.launch", lambda *_: pytest.fail("was launched"))
    monkeypatch.setattr("pretrainkit.topology.granted_cpus", lambda _: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LaunchError, match="devices=17, but this machine has no GPU and grants 2 CPUs; use at most 16"):
        pretrain(model_name="pythia-14m", dataset_path="d", devices=17)
    launched = []
    monkeypatch.setattr("pretrainkit.launchers.launch", lambda *_: launched.append(1))
    pretrain(model_name="pythia-14m", dataset_path="d", devices=16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    pretrain(model_name="pythia-14m", dataset_path="d", devices=17)
    assert launched == [1, 1]


def test_the_signature_and_the_configuration_have_the_same_keys_and_defaults():
    import dataclasses
    import inspect

    from pretrainkit.config import PretrainConfig

    signature = {name: parameter.default for name, parameter in inspect.signature(pretrain).parameters.items()}
    fields = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    assert signature == fields
