"""The benchmarks run from end to end; what they print is a table of figures, and a row that fails is said."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(320)
def test_the_pretraining_benchmark_measures_every_contender_and_says_what_failed(tmp_path):
    """The h100 preset's way through at a size for a CPU, whose float8 row must fail there."""
    output = run("benchmarks/pretrain.py", "--preset=smoke", "--budget_s=280", f"--json={tmp_path / 'runs.json'}")
    cases = json.loads((tmp_path / "runs.json").read_text())["cases"]
    assert len(cases) == 2
    for case in cases:
        rows = {name: runs[0] for name, runs in case["rows"].items()}
        assert set(rows) == {
            "litgpt-eager", "ours", "ours-float8", "ours-autograd-loss", "ours-no-masters",
            "ours-fp32-between-blocks", "ours-repeated-keys", "ours-foreach-adamw",
        }  # fmt: skip
        assert "compute.float8 needs a GPU" in rows.pop("ours-float8")["error"]
        for figures in rows.values():
            assert "error" not in figures
            assert figures["timed_steps"] == 2
            assert min(figures["tokens_per_s"], figures["first_step_s"], figures["memory"]) > 0
    assert output.count("compute.float8 needs a GPU") >= 2


def test_ablations_begin_with_what_ours_has_compiled(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pretrain = importlib.import_module("pretrain")
    warm = []
    for name in ("litgpt", "ours", "ours-muon", "ours", "litgpt"):
        cache = pretrain._compiler_cache(name, tmp_path)
        warm.append((cache / "kernel").exists())
        (cache / "kernel").mkdir(parents=True, exist_ok=True)
    assert warm == [False, False, True, False, False]


def test_the_optimize_benchmark_measures_every_way(tmp_path):
    run("benchmarks/optimize.py", "--repeats=1", "--cores=1", "--sample_mb=1", f"--json={tmp_path / 'rows.json'}")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert set(row["tokens_per_second_per_core"]) == {"ours", "stock", "decode", "engine"}
    assert min(row["tokens_per_second_per_core"].values()) > 0
    assert {"times_stock", "share_of_floor_1", "share_of_floor_2"} <= set(row)


def test_the_streaming_benchmark_measures_every_loader():
    output = run("benchmarks/stream.py", "--rounds=1")
    assert [line.split("  ")[0] for line in output.splitlines()[2:]] == [
        "raw numpy memmap", "raw numpy memmap, by hand", "pretrainkit, no thread", "pretrainkit, 1 thread",
        "litdata StreamingDataLoader, no worker", "litdata StreamingDataLoader, 1 worker",
    ]  # fmt: skip
