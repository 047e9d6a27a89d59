"""Who am I, under each scheduler."""

from __future__ import annotations

import os

import pytest

from pretrainkit.errors import LaunchError
from pretrainkit.topology import Topology, detect, granted_cpus, node_name

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
SLURM = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_no_launcher_is_one_process():
    assert detect({}) == Topology()


def test_torchrun():
    expected = Topology(
        launcher="torchrun", rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, num_nodes=2
    )
    assert detect(TORCHRUN) == expected
    assert detect(TORCHRUN | SLURM) == expected, "srun torchrun: the inner launcher counts"


def test_slurm_step():
    expected = Topology(
        launcher="slurm", rank=4, world_size=5, local_rank=0, local_world_size=1, node_rank=2, num_nodes=3
    )
    assert detect(SLURM) == expected


def test_slurm_allocation_shell_is_one_process():
    assert detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Topology()


def test_kubernetes_indexed_job():
    environ = {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "7"}
    assert detect(environ) == Topology(launcher="kubernetes", rank=3, world_size=7, node_rank=3, num_nodes=7)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK='x' is not a whole number"),
        (TORCHRUN | {"RANK": "9"}, "RANK=9 is not node rank x local world size"),
        (TORCHRUN | {"LOCAL_RANK": "3"}, "RANK=5 is not node rank x local world size"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "not a multiple of LOCAL_WORLD_SIZE=3"),
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETIONS is not set"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "has the part 'two'"),
        (SLURM | {"SLURM_PROCID": "5"}, "rank 5 of 5"),
    ],
)
def test_contradictions_are_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        detect(environ)


def test_granted_cpus_is_the_least_of_all_grants(tmp_path):
    affinity = len(os.sched_getaffinity(0))
    assert granted_cpus({}, cgroup_root=tmp_path) == affinity
    assert granted_cpus({"SLURM_CPUS_PER_TASK": "1"}, cgroup_root=tmp_path) == 1
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert granted_cpus({}, cgroup_root=tmp_path) == min(1, affinity)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert granted_cpus({}, cgroup_root=tmp_path) == affinity


def test_node_name_is_a_folder_name():
    assert node_name({"SLURMD_NODENAME": "../gpu 01"}) == "gpu-01"
