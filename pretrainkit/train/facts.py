"""What a configuration means with this model and this data, before any device is touched.

Comes in: the configuration and the number of ranks. Goes out: the model's configuration, the opened training data and
the plan of steps. Guarantee: everything that can be wrong about them is found here, and nothing is written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import CheckpointError, ConfigError
from pretrainkit.models import build_model, check_vocabulary, resolve_config
from pretrainkit.storage import is_remote
from pretrainkit.stream import BlockSource, document_boundary, open_sources
from pretrainkit.train.arithmetic import RunPlan, plan_run
from pretrainkit.train.manifest import read_manifest
from pretrainkit.train.metrics import METRICS_FILENAME
from pretrainkit.train.parallel import parameter_dtype
from pretrainkit.train.run_folder import TENSORS_FOLDER, complete_checkpoints, foreign_results
from pretrainkit.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a configuration means with this model and this data."""

    model_config: Any
    """litgpt's."""
    block_size: int
    """Context trained with."""
    sources: list[BlockSource]
    """Training data."""
    plan: RunPlan
    """Steps."""


def look_at(config: PretrainConfig, world_size: int) -> Facts:
    """Check a configuration against its model and its data; touches no device and writes nothing.

    The plan is that of a run from the beginning; see `plan_from`.

    Raises:
        ConfigError: Batch sizes, limits or folders do not fit.
        DatasetError: The data is missing, damaged or too little.
        ModelError: The model is unknown or does not fit the data's tokenizer.
    """
    model_config = resolve_config(config.model_name, config.model_config)
    block_size = config.train.max_seq_length or model_config.block_size
    sources = open_training_sources(config, block_size, model_config.padded_vocab_size)
    _check_places(config, sources)
    for source in sources:
        if source.info is not None:
            check_vocabulary(model_config, source.info, source.folder)
    plan = _plan(config, TrainState(), sources, block_size, world_size)
    return Facts(model_config=model_config, block_size=block_size, sources=sources, plan=plan)


def _check_places(config: PretrainConfig, sources: list[BlockSource]) -> None:
    """Refuse one dataset under two names, and a run that would write among a dataset's chunks."""
    folders: dict[str, str] = {}
    for source, name in zip(sources, config.sources, strict=True):
        folder = source.folder if is_remote(source.folder) else os.path.abspath(source.folder)
        if folder in folders:
            raise ConfigError(
                f"data.sources names one dataset twice, as {folders[folder]} and as {name}; leave one out and add the "
                "weights up"
            )
        folders[folder] = name
        if is_remote(name):
            continue
        theirs = [Path(name).resolve() / part for part in ("train", "val")] + [Path(folder).resolve()]
        out_dir = config.out_dir.resolve()
        if out_dir == Path(name).resolve() or any(out_dir.is_relative_to(place) for place in theirs):
            raise ConfigError(f"out_dir={config.out_dir} is in the dataset {name}; give a folder beside it")


def check_start(config: PretrainConfig) -> None:
    """Look whether the run finds what it starts from, and whether its folder is free, as `setup` will.

    Reads no checkpoint's tensors, so that a damaged one is only found when the run starts.

    Raises:
        CheckpointError: There is no checkpoint to begin with or to go on from, or the folder holds a run.
    """
    if isinstance(config.resume, Path):
        read_manifest(config.resume)
        return
    check_nothing_foreign(config)
    if config.resume is False:
        check_no_run(config)
    if not complete_checkpoints(config.out_dir):
        if config.resume is True:
            raise nothing_to_resume(config)
        check_beginning(config)


def check_no_run(config: PretrainConfig) -> None:
    """Refuse a folder with checkpoints that nobody asked to go on from.

    Raises:
        CheckpointError: The folder holds a run.
    """
    present = complete_checkpoints(config.out_dir)
    if present:
        raise CheckpointError(
            f"{config.out_dir} already holds a run ({present[0].name}); add --resume=auto to go on, or give another "
            "--out_dir"
        )


def check_nothing_foreign(config: PretrainConfig) -> None:
    """Refuse a folder with another program's results.

    Raises:
        CheckpointError: A run would replace them.
    """
    foreign = foreign_results(config.out_dir)
    if foreign and not (config.out_dir / METRICS_FILENAME).exists():  # which our runs begin with
        raise CheckpointError(
            f"{config.out_dir} holds {foreign[0]}, which is of no run and would be replaced; give another --out_dir, "
            "or move it away"
        )


def nothing_to_resume(config: PretrainConfig) -> CheckpointError:
    """What to say when `resume` must find something and does not."""
    return CheckpointError(f"{config.out_dir} holds no whole checkpoint to resume; use --resume=auto to begin")


def check_beginning(config: PretrainConfig) -> None:
    """Look whether there is what a run that begins takes its weights from; one that goes on does not need it any more.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    for folder in (config.initial_checkpoint_dir, config.schedule.decay_from):
        if folder is not None and not (folder / TENSORS_FOLDER).exists():
            raise CheckpointError(
                f"{folder} has no {TENSORS_FOLDER}; give a checkpoint of pretraining or a litgpt folder"
            )


def plan_from(state: TrainState, config: PretrainConfig, facts: Facts) -> RunPlan:
    """The steps of a run that goes on from this state; another plan only where its batch size has changed."""
    return _plan(config, state, facts.sources, facts.block_size, facts.plan.world_size)


def _plan(
    config: PretrainConfig, state: TrainState, sources: list[BlockSource], block_size: int, world_size: int
) -> RunPlan:
    return plan_run(
        config.train,
        config.schedule,
        world_size=world_size,
        block_size=block_size,
        num_blocks=sum(source.num_blocks for source in sources),
        portions=state.portions,
        step=state.step,
        tokens=state.tokens,
    )


def open_training_sources(config: PretrainConfig, block_size: int, vocabulary: int) -> list[BlockSource]:
    """The training split of every source; ids from `vocabulary` on are refused."""
    return open_sources(
        config.sources,
        "train",
        block_size,
        vocabulary=vocabulary,
        cache_dir=config.data.cache_dir,
        max_cache_bytes=config.data.max_cache_bytes,
    )


def new_model(config: PretrainConfig, facts: Facts, device: torch.device) -> torch.nn.Module:
    """The model on the meta device, with the types it will have.

    Raises:
        DatasetError: document_mask is on and nothing says how documents are told apart.
    """
    boundary = document_boundary(facts.sources) if config.data.document_mask else None
    with torch.device("meta"), parameter_dtype(config.precision):
        return build_model(
            facts.model_config,
            loss=config.loss,
            max_seq_length=config.train.max_seq_length,
            tie_embeddings=config.train.tie_embeddings,
            document_boundary=boundary,
            compile_loss=device.type == "cuda" and config.compute.compile is not False,
        )
