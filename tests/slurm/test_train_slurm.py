"""Training under a real srun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import TINY_MODEL, write_split

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]


def test_srun_trains_on_two_nodes(slurm, tmp_path):
    write_split(tmp_path / "data" / "train", "train", 20_000, 1)
    settings = {
        "model_config": TINY_MODEL,
        "dataset_path": str(tmp_path / "data"),
        "out_dir": str(tmp_path / "run"),
        "train": {"global_batch_size": 16, "micro_batch_size": 4, "max_steps": 4, "min_lr": 1e-4},
        "num_nodes": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "distributed_pretrain.py"), f"--config={tmp_path / 'run.yaml'}"]
    srun = ("srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", *command)
    # The names of this cluster's nodes lead to no address, which gets one clear line instead of a long wait.
    result = slurm.run(*srun)
    assert "'n1' leads to no address" in result.stderr
    result = slurm.run(*srun, timeout_s=300, MASTER_ADDR="127.0.0.1")
    assert result.returncode == 0, result.stderr
    parsed = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["world_size"] for row in parsed if row["event"] == "start"] == [2]
    assert [row["step"] for row in parsed if row["event"] == "train"] == [1, 2, 3, 4]
