#!/usr/bin/env python3
"""Whether two runs are the same run: compare their metrics step by step.

Comes in: two run folders, or one folder whose run was interrupted and resumed and one that was not. Goes out: exit code
0 when every common step saw the same data and had the same loss, else 1 and the first step that differs.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone

from pretrainkit.cli import run_cli
from pretrainkit.errors import CheckpointError, InputError
from pretrainkit.train.metrics import METRICS_FILENAME

logger = logging.getLogger("pretrainkit.verify_resume")  # run_cli shows what the package says


def verify_resume(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """Compare the steps that two runs have in common.

    Args:
        first: A run folder.
        second: Another.
        tolerance: Largest relative difference of losses; 0 asks for equal bits (same number of ranks), 1e-5 suits
            another number of ranks.

    Raises:
        CheckpointError: They differ, or have no step in common.
    """
    rows, others = _train_rows(first), _train_rows(second)
    common = sorted(rows.keys() & others.keys())
    if not common:
        raise CheckpointError(f"{first} and {second} have no logged step in common; give two runs of one configuration")
    largest = 0.0
    for step in common:
        row, other = rows[step], others[step]
        if row["digest"] != other["digest"]:
            raise CheckpointError(f"step {step}: the data differ (digests {row['digest']} and {other['digest']})")
        difference = abs(float(row["loss"]) - float(other["loss"])) / max(abs(float(row["loss"])), 1e-12)
        largest = max(largest, difference)
        if difference > tolerance:
            raise CheckpointError(f"step {step}: the losses differ, {row['loss']} and {other['loss']}")
    logger.info("%d steps in common: the same data, losses equal to %.1e", len(common), largest)


def _train_rows(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> the last row logged for it; a resumed run logs the steps after its checkpoint once more."""
    path = run / METRICS_FILENAME
    if not path.is_file():
        raise InputError(f"{run} has no {METRICS_FILENAME}; give a run folder")
    parsed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row for row in parsed if row["event"] == "train"}


if __name__ == "__main__":
    run_cli(verify_resume, positional=("first", "second"))
