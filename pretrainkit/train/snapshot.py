"""A run's state as tensors and a record, and back.

Comes in: the model, the optimizers and the counters, live. Goes out: what a checkpoint holds. Guarantees: tensors are
named by parameter, so that they fit any number of ranks; the record is plain JSON; taking up a record says what has
changed since.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrainkit._version import __version__
from pretrainkit.config import PretrainConfig
from pretrainkit.errors import CheckpointError
from pretrainkit.models.masters import cast_masters, stored, stored_state
from pretrainkit.stream import Cursor
from pretrainkit.stream.cursor import differences
from pretrainkit.train.facts import Facts
from pretrainkit.train.guard import Guard
from pretrainkit.train.run_folder import TENSORS_FOLDER
from pretrainkit.train.state import TrainState, changes, config_to_dict, read_record
from pretrainkit.train.window import Window

logger = logging.getLogger(__name__)

# Changes of these give every position of the data another block.
_ORDER_KEYS = ("seed:", "data.shuffle:")


class Snapshots:
    """Takes and restores the state of one run."""

    def __init__(
        self,
        config: PretrainConfig,
        facts: Facts,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        guard: Guard,
        window: Window,
        state: TrainState,
        group: Any,
    ) -> None:
        self._config = config
        self._facts = facts
        self._model = model
        self._optimizers = optimizers
        self._guard = guard
        self._window = window
        self._state = state
        self._group = group

    def tensors(self) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": {name: {what: tensor}}}, sharing memory with the live ones."""
        states: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        for optimizer in self._optimizers:
            states.update(optimizer.state)  # type: ignore[arg-type]
        named = self._model.named_parameters()
        return {
            "model": stored_state(self._model),
            "optimizer": {name: dict(states[stored(parameter)]) for name, parameter in named},
        }

    def take(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(tensors, record) as they are now; waits for the device."""
        record = {
            "state": dataclasses.asdict(self._state),
            "guard": self._guard.state_dict(),
            "window": self._window.state(),
            "config": config_to_dict(self._config),
            "model_config": self._model_config(),
            "datasets": [source.fingerprint for source in self._facts.sources],
            "world_size": self._facts.plan.world_size,
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "versions": {"pretrainkit": __version__, "torch": torch.__version__},
        }
        return self.tensors(), record

    def restore(self, folder: Path) -> dict[str, Any]:
        """Fill model, optimizers and guard from a checkpoint, and return its record; the counters stay. On every rank.

        Raises:
            CheckpointError: It is of another model.
        """
        record = read_record(folder)
        different = changes(record.get("model_config", {}), self._model_config())
        if different:
            raise CheckpointError(
                f"{folder} is of another model ({'; '.join(different[:3])}); resume with the same model, or begin in "
                "another --out_dir"
            )
        from pretrainkit.train.dcp import read_tensors  # slow to import, and few runs read a checkpoint

        read_tensors(self.tensors(), folder / TENSORS_FOLDER, self._group)
        cast_masters(self._model)
        self._guard.load_state_dict(record["guard"])
        return record

    def resume(self, folder: Path, *, rank: int) -> list[str]:
        """Go on from the checkpoint that the counters are from, and say what is different from the run that wrote it.

        Returns:
            What is different, in words.
        """
        record = self.restore(folder)
        state = self._state
        state.restarts += 1
        rng = bytearray(base64.b64decode(record["rng"]))
        torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
        different = changes(record["config"], config_to_dict(self._config))
        different += self.open_data()
        if any(line.startswith(_ORDER_KEYS) for line in different):
            different.append(
                "the order of the data: what is left of this pass repeats some blocks and leaves out others"
            )
        if "window" in record:
            self._window.go_on(record["window"], rank)
        if rank == 0:
            logger.info("going on from %s, after step %d and %s blocks", folder, state.step, f"{state.samples:,}")
            for line in different:
                logger.warning("changed since that checkpoint: %s", line)
            before, after = record["world_size"], self._facts.plan.world_size
            if before != after:
                logger.info("ranks: %d -> %d; the global batch stays as configured", before, after)
        return different

    def open_data(self) -> list[str]:
        """Let the state's cursor go on with the sources of this run, and return what is different, in words."""
        state, sources, weights = self._state, self._facts.sources, list(self._config.sources.values())
        before = state.cursor
        if before is None:
            state.cursor = Cursor.begin(sources, weights)
            return []
        state.cursor = before.go_on(state.samples, sources, weights)
        return differences(before, state.cursor)

    def _model_config(self) -> dict[str, Any]:
        config = dataclasses.asdict(self._facts.model_config)
        # What does not change a weight's shape or meaning may differ.
        return {name: value for name, value in config.items() if name not in ("name", "hf_config") and _plain(value)}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
