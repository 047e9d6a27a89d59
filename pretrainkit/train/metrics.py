"""What a run says: one line per logged step on the terminal, every number in metrics.jsonl, and loggers on request.

Comes in: rows of numbers, on rank 0. Goes out: RUN/metrics.jsonl (always), wandb, tensorboard or csv. Guarantees: each
line of the file is whole JSON; a logger that cannot be reached is said once and never stops the training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pretrainkit.config import PretrainConfig
from pretrainkit.storage import storage_errors
from pretrainkit.train.loggers import MetricsLogger, open_logger
from pretrainkit.train.state import TrainState

logger = logging.getLogger(__name__)

METRICS_FILENAME = "metrics.jsonl"
_A_YEAR_S = 365 * 86_400

# Dense bf16 operations per second. Source: the makers' data sheets, without sparsity.
_PEAK_FLOPS = {
    "B200": 2.25e15, "B100": 1.75e15, "GB200": 2.5e15, "H200": 989e12, "H200 NVL": 835e12, "GH200": 989e12,
    "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
    "A6000": 155e12, "A40": 150e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12,
    "T4": 65e12, "MI300X": 1307e12, "MI250X": 191e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a GPU by its name; None when it is not known."""
    known = [name for name in _PEAK_FLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What turns tokens per second into utilisation."""

    num_devices: int
    """Ranks."""
    peak_flops: float | None
    """Of one device; None leaves MFU out."""
    flops_per_token: float
    """Full attention counted."""
    flops_per_token_causal: float
    """Half the attention counted, as a causal mask needs."""

    def of(self, tokens_per_s: float) -> dict[str, float]:
        """Throughput and utilisation."""
        values = {"tokens_per_s": tokens_per_s, "tokens_per_s_per_device": tokens_per_s / self.num_devices}
        if self.peak_flops is not None:
            values["mfu"] = tokens_per_s * self.flops_per_token / (self.peak_flops * self.num_devices)
            values["mfu_causal"] = tokens_per_s * self.flops_per_token_causal / (self.peak_flops * self.num_devices)
        return values


def memory_gb() -> float:
    """Most memory this process ever held: the GPU's where there is one, else its own."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsWriter:
    """Rank 0's pen; on other ranks every call does nothing."""

    def __init__(self, config: PretrainConfig, settings: dict[str, Any], state: TrainState, *, rank: int) -> None:
        self._loggers: list[MetricsLogger] = []
        self._file = None
        if rank != 0:
            return
        path = config.out_dir / METRICS_FILENAME
        with storage_errors(f"write {path}"):
            config.out_dir.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        if config.logger_name != "none":
            self._loggers.append(open_logger(config, settings, state))

    def write(self, event: str, state: TrainState, **values: Any) -> None:
        """Add a row: what happened, where the run stands, and numbers (None is left out)."""
        if self._file is None:
            return
        row = {"event": event, "step": state.step, "tokens": state.tokens, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in values.items() if value is not None}
        with _said("metrics.jsonl cannot be written"):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for metrics_logger in self._loggers:
            with _said("metrics cannot be logged"):
                metrics_logger.log(numbers, state.step)

    def close(self) -> None:
        """Finish what loggers still send."""
        for metrics_logger in self._loggers:
            with _said("metrics cannot be logged"):
                metrics_logger.close()
        if self._file is not None:
            with _said("metrics.jsonl cannot be written"):
                self._file.close()


@contextlib.contextmanager
def _said(problem: str) -> Iterator[None]:
    """A full disk must not end the training: the next save says so too."""
    try:
        yield
    except OSError as error:
        logger.warning("%s (%s); training goes on", problem, error.strerror or error)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: such a number becomes text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def earlier_starts(out_dir: Path) -> list[float]:
    """When a run in this folder was started or resumed before, Unix times in order."""
    times = []
    path = out_dir / METRICS_FILENAME
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            row = json.loads(line)
            if row["event"] in ("start", "resume"):
                times.append(float(row["time"]))
    return times


def _cut_torn_line(path: Path) -> None:
    """Remove a last line without its end, left by a kill."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())


def train_line(row: dict[str, Any], total_steps: int | None) -> str:
    """One logged step in one line."""
    parts = [
        f"step {row['step']:,}" + (f"/{total_steps:,}" if total_steps else ""),
        f"{_short(row['tokens'])} tokens",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"norm {row['grad_norm']:.2f}",
        f"{_short(row['tokens_per_s'])} tok/s ({_short(row['tokens_per_s_per_device'])} each)",
    ]
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%} ({row['mfu_causal']:.1%} causal)")
    parts += [f"mem {row['memory_gb']:.1f} GB", f"data {row['data_wait']:.1%}"]
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    if row.get("remaining_s") is not None:
        parts.append(f"{duration(row['remaining_s'])} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Time for people; "as many steps as there is time for" is often written as more than any calendar holds."""
    return str(timedelta(seconds=round(seconds))) if seconds <= _A_YEAR_S else "more than a year"


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.{1 if unit == 'k' else 2}f}{unit}"
    return f"{number:,.0f}"
