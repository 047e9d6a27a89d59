"""scripts/verify_resume.py tells equal runs from different ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = {
    "event": "train", "tokens": 64, "time": 1.0, "digest": "00ff", "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5,
    "skipped": 0,
}  # fmt: skip


def verify(tmp_path: Path, changes: dict, *flags: str, torn: bool = False) -> tuple[int, str]:
    for name, last in (("one", ROW), ("other", ROW | changes)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(row | {"step": step}) for step, row in enumerate((ROW, last), start=1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + ('\n{"event": "tr' if torn else "\n"))
    command = [sys.executable, "scripts/verify_resume.py", str(tmp_path / "one"), str(tmp_path / "other"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"digest": "00fe"}, "step 2: the data differ (digests 00ff and 00fe)"),
        ({"loss": 2.0000000000000004}, "step 2: the losses differ, 2.0 and 2.0000000000000004"),
        ({"loss": "nan"}, "step 2: the losses differ, 2.0 and nan"),
        ({"loss": "inf"}, "step 2: the losses differ, 2.0 and inf"),
        ({"learning_rate": 3e-3}, "step 2: the learning rates differ, 0.001 and 0.003"),
        ({"grad_norm": 0.6}, "step 2: the gradient norms differ, 0.5 and 0.6"),
        ({"skipped": 1}, "step 2: 0 and 1 steps were skipped"),
    ],
)
def test_a_difference_is_named(tmp_path, changes, said):
    assert verify(tmp_path, changes) == (2, f"error: {said}\n")


def test_a_tolerance_is_for_what_rounding_changes(tmp_path):
    code, output = verify(tmp_path, {"loss": 2.00001, "grad_norm": 0.6}, "--tolerance=1e-5")
    assert (code, "2 steps in common: the same data, losses equal to 5.0e-06" in output) == (0, True)


def test_a_torn_last_line_is_left_out(tmp_path):
    code, output = verify(tmp_path, {}, torn=True)
    assert code == 0
    assert "2 steps in common: the same data, losses equal to 0.0e+00" in output
