"""First weights from a checkpoint instead of from the seed.

Comes in: a checkpoint of ours (a folder), or litgpt's (a file). Goes out: the same model with those weights. Guarantee:
each rank copies its own part; nothing in a file is executed.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import CheckpointError
from pretrainkit.models.masters import cast_masters, stored_state
from pretrainkit.train.manifest import MANIFEST_FILENAME
from pretrainkit.train.optimizer import own_part
from pretrainkit.train.run_folder import TENSORS_FOLDER, verify_checkpoint
from pretrainkit.train.snapshot import Snapshots
from pretrainkit.train.state import TrainState


def load_initial(config: PretrainConfig, model: nn.Module, snapshots: Snapshots, state: TrainState, group: Any) -> None:
    """Begin as the configuration says: from the seed, from weights, or from the stable phase of another run.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another model.
    """
    if config.schedule.decay_from is not None:
        folder = config.schedule.decay_from
        verify_checkpoint(folder)
        before = snapshots.restore(folder)["state"]
        # Its own steps and tokens begin anew; the data goes on, so that nothing is seen twice.
        state.samples, state.data_step, state.cursor = before.samples, before.data_step, before.cursor
    elif config.initial_checkpoint_dir is not None:
        load_weights(stored_state(model), config.initial_checkpoint_dir, group)
        cast_masters(model)
    snapshots.open_data()


def load_weights(weights: dict[str, torch.Tensor], folder: Path, group: Any) -> None:
    """Fill named weights, sharded or not, from a folder with `lit_model.pth`. Call on every rank.

    Raises:
        CheckpointError: No such folder, damaged, or of another model.
    """
    path = folder / TENSORS_FOLDER
    if path.is_dir():
        if (folder / MANIFEST_FILENAME).is_file():
            verify_checkpoint(folder)
        from pretrainkit.train.dcp import read_tensors

        read_tensors({"model": weights}, path, group)
        return
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TENSORS_FOLDER}; give a checkpoint of pretraining or a litgpt folder")
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no file of tensors ({type(error).__name__}); it is damaged") from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds no tensors by name; give a checkpoint of pretraining or a litgpt folder")
    for name, target in weights.items():
        if name not in found or found[name].shape != target.shape:
            there = f"has shape {tuple(found[name].shape)} there" if name in found else "is not in it"
            raise CheckpointError(f"{path} is of another model: {name} {there}, and {tuple(target.shape)} here")
        local = target.to_local() if hasattr(target, "to_local") else target
        local.copy_(own_part(found[name], target))
