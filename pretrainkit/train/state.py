"""Where a run stands: the numbers that a checkpoint carries beside its tensors.

Comes in: counters that the loop moves. Goes out: `state.json` in every checkpoint. Guarantee: plain JSON; with the
tensors, the configuration and the dataset it is all that a run needs to go on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import CheckpointError
from pretrainkit.train.arithmetic import Portion

if TYPE_CHECKING:
    from pretrainkit.stream import Cursor

STATE_FILENAME = "state.json"
DIGEST_MASK = (1 << 63) - 1  # digests add up modulo 2^63

# Keys that may differ between a run and its continuation without a word: where it runs, not what it computes. What
# differs in the data, the cursor says.
_PLACE_KEYS = ("out_dir", "resume", "devices", "num_nodes", "launcher", "dry_run", "log", "logger_name",
               "dataset_path", "data.sources", "data.num_workers", "data.prefetch_batches", "data.cache_dir",
               "data.max_cache_bytes", "checkpoint",
               "compute.hang_timeout_s", "compute.peak_flops", "train.log_interval", "train.save_interval", "eval",
               "tokenizer_dir")  # fmt: skip


@dataclass(kw_only=True)
class TrainState:
    """Counters of a run; the one mutable record of training."""

    step: int = 0
    """Optimizer steps behind us, skipped ones included."""
    data_step: int = 0
    """Global batches taken from the data; ahead of `step` where a rewind left a bad window out."""
    tokens: int = 0
    """Tokens trained."""
    samples: int = 0
    """Blocks taken from the data, whatever the batch sizes were: the next one is the first not taken yet."""
    cursor: Cursor | None = None
    """What was taken from which source; None before the data was opened."""
    portions: tuple[Portion, ...] = ()
    """Steps of one size each: a new one begins where the batch size was changed."""
    train_seconds: float = 0.0
    """Time spent in steps that this state contains."""
    save_seconds: float = 0.0
    """Time the last save took: what `train.max_time` must leave room for."""
    validation_seconds: float = 0.0
    """Time the last validation took: likewise, where there is one at the end."""
    begun_at: float = field(default_factory=time.time)
    """Unix time of the run's very first start."""
    restarts: int = 0
    """Times the run was resumed."""
    rewinds: int = 0
    """Times it went back to a checkpoint because of skipped steps."""
    digest: int = 0
    """Order-sensitive digest of every token trained on, over all ranks; equal for equal data on any topology."""
    recent_skips: int = 0
    """Steps skipped in the guard's window when this was saved; a good checkpoint has none."""
    wandb_id: str | None = None
    """The run's id in wandb, so that a continuation goes on in the same place."""

    @property
    def goodput(self) -> float:
        """Share of the time since the very first start that went into steps which count."""
        return self.train_seconds / max(time.time() - self.begun_at, 1e-9)


def read_record(folder: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`.

    Raises:
        CheckpointError: Missing, or not ours.
    """
    try:
        record = json.loads((folder / STATE_FILENAME).read_text(encoding="utf-8"))
        missing = [key for key in ("config", "guard", "rng", "world_size") if key not in record]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        record["state"] = _parse_state(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILENAME} cannot be read ({error}); take another checkpoint") from error
    result: dict[str, Any] = record
    return result


def _parse_state(record: dict[str, Any]) -> TrainState:
    from pretrainkit.stream import Cursor

    state = dict(record["state"])
    for counter in dataclasses.fields(TrainState):
        value = state.get(counter.name, counter.default)
        if isinstance(counter.default, int | float) and not isinstance(value, int | float):
            raise TypeError(f"{counter.name} is {value!r}, not a number")
    if "cursor" not in state:  # written before batch sizes and mixtures could change
        state |= _first_cursor(record)
    cursor = state.pop("cursor")
    portions = tuple(Portion(**portion) for portion in state.pop("portions"))
    return TrainState(cursor=None if cursor is None else Cursor.from_dict(cursor), portions=portions, **state)


def _first_cursor(record: dict[str, Any]) -> dict[str, Any]:
    """Cursor and portions of a checkpoint from a run in which neither had changed."""
    state, config = record["state"], record["config"]
    weights = config["data"]["sources"] or {config["dataset_path"]: 1.0}
    sources = [
        {"folder": folder, "fingerprint": fingerprint, "weight": weight, "order": index}
        for index, ((folder, weight), fingerprint) in enumerate(zip(weights.items(), record["datasets"], strict=True))
    ]
    block_size = config["train"]["max_seq_length"] or record["model_config"]["block_size"]
    portions = [{"tokens_per_step": state["tokens"] // state["step"]}] if state["step"] else []
    return {"cursor": {"sources": sources, "block_size": block_size}, "portions": portions}


def config_to_dict(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as plain data, for YAML and JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations in a way that can change the result: "key: old -> new"."""
    lines: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        name = f"{prefix}{key}"
        if name in _PLACE_KEYS:
            continue
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines
