"""Every file in config_hub is parsed by the real parser, can be built, adds up, and explains itself truly."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import Config

from pretrainkit import models
from pretrainkit.arguments import parse
from pretrainkit.config import PretrainConfig
from pretrainkit.merge import merge_datasets
from pretrainkit.train import pretrain
from pretrainkit.train.arithmetic import accumulation_steps, plan_run

HUB = Path(__file__).parent.parent / "config_hub"
FILES = sorted(HUB.glob("*.yaml"))
GPU_BYTES = 80e9
# Largest id of the tokenizer each model is meant for, plus one.
VOCABULARIES = {
    "debug-cpu": 50_257,
    "llama3-8b": 128_256,
    "llama3.2-1b": 128_256,
    "pythia-160m": 50_277,
    "quickstart": 4_096,
    "qwen3-0.6b": 151_669,
    "tinyllama-1.1b": 32_000,
}
PARAMETERS = {
    "debug-cpu": 14_067_712,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "pythia-160m": 162_322_944,
    "quickstart": 1_901_696,
    "qwen3-0.6b": 596_049_920,
    "tinyllama-1.1b": 1_100_048_384,
}


@functools.cache
def read(path):
    return PretrainConfig(**parse(pretrain, ["--config", str(path)]))


def test_hub_holds_the_models_it_promises():
    assert [path.stem for path in FILES] == sorted(VOCABULARIES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_parsed_as_written(path):
    config = read(path)
    for keys, value in leaves(yaml.safe_load(path.read_text())):
        field = config
        for key in keys:
            field = field[key] if isinstance(field, dict) else getattr(field, key)
        expected = tuple(value) if isinstance(value, list) else value
        assert str(field) == str(expected), ".".join(keys)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_model_can_be_built_and_has_an_embedding_for_every_token(path):
    config = read(path)
    model_config = models.resolve_config(config.model_name, config.model_config)
    with torch.device("meta"):
        model = models.build_model(
            model_config,
            loss=config.loss,
            max_seq_length=config.train.max_seq_length,
            tie_embeddings=config.train.tie_embeddings,
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[path.stem]
    assert count == models.num_parameters(model_config, tie_embeddings=config.train.tie_embeddings)
    assert model_config.padded_vocab_size >= VOCABULARIES[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_batches_and_tokens_add_up(path):
    config = read(path)
    world_size = config.devices * config.num_nodes
    assert accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size) >= 1
    block_size = config.train.max_seq_length
    plan = plan_run(
        config.train, config.schedule, world_size=world_size, block_size=block_size, num_blocks=2**31 // block_size
    )
    assert plan.notes == ()  # no token is left over
    assert plan.warmup_steps < plan.total_steps / 5
    assert plan.total_steps >= config.eval.interval


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in ("debug-cpu", "quickstart")], ids=lambda path: path.stem
)
def test_training_fits_the_devices_it_names(path):
    config = read(path)
    facts = models.memory_facts(
        models.resolve_config(config.model_name, config.model_config),
        block_size=config.train.max_seq_length,
        micro_batch_size=config.train.micro_batch_size,
        checkpointing=config.compute.activation_checkpointing,
        tie_embeddings=config.train.tie_embeddings,
    )
    ranks_per_copy = config.devices * config.num_nodes // (config.compute.replicas or config.num_nodes)
    state = 16 * facts.parameters / ranks_per_copy  # fp32 parameter, gradient and two AdamW averages
    gathered = 2 * 2 * facts.largest_block_parameters  # two parts in bf16: one in use, one on its way
    needed = state + gathered + facts.activation_bytes + GPU_BYTES / 20  # at most that much is a chunk of logits
    assert needed < 0.9 * GPU_BYTES, f"{needed / 1e9:.0f} GB"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_explained_with_its_true_default(path):
    lines = path.read_text().splitlines()
    section: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        match = re.match(r"( *)([a-z_0-9]+):(.*)", line)
        if match is None:
            continue
        indent, key = len(match[1]), match[2]
        section = [(depth, name) for depth, name in section if depth < indent] + [(indent, key)]
        comment = comment_above(lines, number)
        assert comment, f"{path.name}:{number + 1} has no comment"
        if match[3].strip():
            value = yaml.safe_load(re.search(r"Default: (.*)\.$", comment)[1])
            assert same(value, default_of([name for _, name in section])), f"{path.name}:{number + 1} {comment}"


def test_merge_example_is_parsed():
    written = yaml.safe_load((HUB / "data/merge.yaml").read_text())
    parsed = parse(merge_datasets, ["--config", str(HUB / "data/merge.yaml")])
    assert {key: str(parsed[key]) for key in written} == {key: str(value) for key, value in written.items()}


def leaves(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def comment_above(lines, number):
    first = number
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[first:number])


def default_of(names):
    if names[0] == "model_config":
        return next(field.default for field in dataclasses.fields(Config) if field.name == names[1])
    holder = PretrainConfig
    for name in names[:-1]:
        holder = typing.get_type_hints(holder)[name]
    return next(field.default for field in dataclasses.fields(holder) if field.name == names[-1])


def same(written, default):
    if isinstance(default, tuple):
        return tuple(written) == default
    if isinstance(default, Path):
        return Path(written) == default
    return written == default or str(written) == str(default)
