"""What a configuration means with this model and this data, before any device is touched.

Comes in: the configuration and the number of ranks. Goes out: the model's configuration, the opened training data and
the plan of steps. Guarantee: everything that can be wrong about them is found here, and nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import CheckpointError
from pretrainkit.models import build_model, check_vocabulary, resolve_config
from pretrainkit.stream import BlockSource, document_boundary, open_sources
from pretrainkit.train.arithmetic import RunPlan, plan_run
from pretrainkit.train.parallel import parameter_dtype
from pretrainkit.train.run_folder import TENSORS_FOLDER
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
        ConfigError: Batch sizes or limits do not fit.
        DatasetError: The data is missing, damaged or too little.
        ModelError: The model is unknown or does not fit the data's tokenizer.
    """
    model_config = resolve_config(config.model_name, config.model_config)
    block_size = config.train.max_seq_length or model_config.block_size
    sources = open_training_sources(config, block_size, model_config.padded_vocab_size)
    for source in sources:
        if source.info is not None:
            check_vocabulary(model_config, source.info, source.folder)
    plan = _plan(config, TrainState(), sources, block_size, world_size)
    return Facts(model_config=model_config, block_size=block_size, sources=sources, plan=plan)


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
