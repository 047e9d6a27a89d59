#!/usr/bin/env python3
"""Whether two runs are the same run: compare their metrics step by step.

Comes in: two run folders, of a run that was interrupted and resumed and of one that was not, say. Goes out: exit code 0
when every common step saw the same data and came to the same numbers, else 2 and the first step that differs.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone

from pretrainkit.cli import run_cli
from pretrainkit.errors import CheckpointError
from pretrainkit.report.runs import read_run

logger = logging.getLogger("pretrainkit.verify_resume")  # run_cli shows what the package says

_COMPARED = {"learning_rate": "learning rates", "loss": "losses", "grad_norm": "gradient norms"}


def verify_resume(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """Compare the steps that two runs have in common.

    Args:
        first: A run folder.
        second: Another.
        tolerance: Largest relative difference of losses and learning rates; 0 asks for equal bits (same number of
            ranks), of gradient norms too; 1e-5 suits another number of ranks (with Muon or in bf16 1e-2).

    Raises:
        CheckpointError: They differ, or have no step in common.
        InputError: One is no run folder.
    """
    rows, others = ({row["step"]: row for row in read_run(run).train} for run in (first, second))
    common = sorted(rows.keys() & others.keys())
    if not common:
        raise CheckpointError(f"{first} and {second} have no logged step in common; give two runs of one configuration")
    largest = 0.0
    for step in common:
        row, other = rows[step], others[step]
        if row["digest"] != other["digest"]:
            raise CheckpointError(f"step {step}: the data differ (digests {row['digest']} and {other['digest']})")
        if row["skipped"] != other["skipped"]:
            raise CheckpointError(f"step {step}: {row['skipped']} and {other['skipped']} steps were skipped")
        for key, name in _COMPARED.items():
            difference = _difference(float(row[key]), float(other[key]))
            if difference > tolerance and (key != "grad_norm" or tolerance == 0):
                raise CheckpointError(f"step {step}: the {name} differ, {row[key]} and {other[key]}")
            largest = max(largest, difference if key == "loss" else 0.0)
    logger.info("%d steps in common: the same data, losses equal to %.1e", len(common), largest)


def _difference(one: float, other: float) -> float:
    """Relative to the first; nothing is near what is not finite but the same."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other) / max(abs(one), 1e-12)
    return difference if math.isfinite(difference) else math.inf


if __name__ == "__main__":
    run_cli(verify_resume, positional=("first", "second"))
