"""What a run loads before its first step: start-up is mostly imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import TINY_MODEL

ROOT = Path(__file__).parent.parent.parent
# The compiler, what it stands on, what reads and writes checkpoints, and what litgpt and Lightning load without need.
UNNEEDED = [
    "lightning.pytorch", "litdata", "litgpt.utils", "matplotlib", "pandas", "pyarrow", "ray", "scipy", "sympy",
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torchmetrics.functional", "transformers", "wandb",
]  # fmt: skip


@pytest.mark.slow
def test_an_uncompiled_run_loads_nothing_it_does_not_need_before_its_first_step(dataset, tmp_path):
    code = f"""
import sys
from pretrainkit.cli import run_command
from pretrainkit.train.metrics import MetricsWriter

def write(self, event, state, **values):
    if event == "train":
        print(*sorted(set({UNNEEDED!r}) & set(sys.modules)), "end")

MetricsWriter.write = write
run_command("pretrain", [
    "--dataset_path={dataset}", "--out_dir={tmp_path / "run"}", "--train.max_steps=1", "--train.global_batch_size=4",
    '--model_config={json.dumps(TINY_MODEL)}', "--devices=1", "--eval.final_validation=false",
])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["end"]
