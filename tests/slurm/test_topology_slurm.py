"""What a real Slurm step says about its tasks."""

from __future__ import annotations

import sys

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def test_each_task_of_a_step_knows_its_place(slurm):
    code = (
        "import os; from pretrainkit.topology import detect, node_name; t = detect(os.environ);"
        "print(t.launcher, t.rank, t.world_size, t.local_rank, t.local_world_size, t.node_rank, t.num_nodes,"
        " node_name(os.environ))"
    )
    result = slurm.run(
        "srun", "--nodes=2", "--ntasks=3", "--cpus-per-task=1", "--distribution=block", sys.executable, "-c", code
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [
        "slurm 0 3 0 2 0 2 n1",
        "slurm 1 3 1 2 0 2 n1",
        "slurm 2 3 0 1 1 2 n2",
    ]
