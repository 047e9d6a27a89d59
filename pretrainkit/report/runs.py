"""A run's `metrics.jsonl`, read back: each step once, as it counted in the end."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrainkit.errors import InputError
from pretrainkit.registry import did_you_mean

_log = logging.getLogger(__name__)

METRICS_FILENAME = "metrics.jsonl"
_END = 253_402_300_800  # Unix time of the year 10000, with which calendars end

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """One run's rows, by what they tell of."""

    name: str
    """Folder name."""
    folder: Path
    """The run's folder."""
    train: list[Row]
    """Logged steps, in order, each step once."""
    validation: list[Row]
    """Validations, in order, each step once."""
    events: list[Row]
    """Start, resume, rewind, stop and end, as they happened."""

    def series(self, key: str, x: str) -> tuple[list[float], list[float]]:
        """Points of one number over tokens (x="tokens") or over hours since the beginning (x="hours")."""
        rows = self.validation if key.startswith("val_") else self.train
        begun = self.events[0]["time"] if self.events else self.train[0]["time"]
        points = [(row, number) for row in rows if (number := _number(row.get(key))) is not None]
        places = [(row["time"] - begun) / 3600 if x == "hours" else row["tokens"] for row, _ in points]
        return places, [number for _, number in points]

    def names(self, key: str) -> list[str]:
        """The number itself and its parts by source, such as val_loss and val_loss/FOLDER."""
        rows = self.validation if key.startswith("val_") else self.train
        found = {name for row in rows for name in row if name == key or name.startswith(f"{key}/")}
        return sorted(found)

    def values(self, key: str) -> list[float]:
        """The finite values of one number."""
        return [value for value in self.series(key, "tokens")[1] if math.isfinite(value)]


def read_run(folder: Path) -> RunMetrics:
    """A run's metrics without what a resume or a rewind has replaced.

    Raises:
        InputError: No metrics there, or no logged step in them.
    """
    path = folder / METRICS_FILENAME
    if not path.is_file():
        siblings = [sibling.name for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = [] if folder.is_dir() else did_you_mean(folder.name, siblings, limit=1)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
        raise InputError(f"{folder} has no {METRICS_FILENAME}; give the out_dir of a pretraining run{hint}")
    train: list[Row] = []
    validation: list[Row] = []
    events: list[Row] = []
    for row in _rows(path):
        if row["event"] in ("train", "validation"):
            rows = train if row["event"] == "train" else validation
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()  # the same step again: this run of it is the one that counts
            rows.append(row)
        elif row["event"] != "save":
            events.append(row)
            if row["event"] in ("resume", "rewind"):
                train = [old for old in train if old["step"] <= row["step"]]
                validation = [old for old in validation if old["step"] <= row["step"]]
    if not train:
        raise InputError(f"{path} holds no logged step yet; wait for the first one, or lower train.log_interval")
    return RunMetrics(name=folder.resolve().name, folder=folder, train=train, validation=validation, events=events)


def _number(value: Any) -> float | None:
    """What a row says, as a number; NaN and infinity stand as text in JSON, and any other text is none."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in ("nan", "inf", "-inf")):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number that no float can be
        return None


def _is_row(row: Any) -> bool:
    """Whether a line says what happened, where the run stood, and when."""
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return False
    counts = [row.get("step"), row.get("tokens")]
    when = _number(row.get("time"))
    return all(type(count) is int and 0 <= count < 2**63 for count in counts) and when is not None and 0 <= when < _END


def _rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            complete = _is_row(row)
        except (ValueError, RecursionError):
            complete = False
        if complete:
            rows.append(row)
        else:
            _log.warning("%s line %d is not a row of metrics; left out", path, number)
    return rows
