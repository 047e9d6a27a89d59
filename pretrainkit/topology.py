"""Who am I: rank, node, world size and granted CPUs, read from whatever scheduler started this process.

Comes in: an environment mapping (never `os.environ` by itself, so that it is a pure function and testable). Goes out:
one frozen `Topology`. Guarantee: half-set or contradicting variables are refused instead of guessed, because two
processes that both believe to be rank 0 train on duplicated data without a word.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrainkit.errors import LaunchError

Launcher = Literal["torchrun", "slurm", "kubernetes", "none"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The place of one process among all."""

    launcher: Launcher = "none"
    """Whose variables were read."""
    rank: int = 0
    """Index of this process, 0 .. world_size - 1."""
    world_size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Index of this process on its node."""
    local_world_size: int = 1
    """Processes on this node."""
    node_rank: int = 0
    """Index of this node."""
    num_nodes: int = 1
    """Nodes in all."""

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise LaunchError(
                f"the {self.launcher} environment says rank {self.rank} of {self.world_size}, local rank "
                f"{self.local_rank} of {self.local_world_size}; unset stale variables or start through one launcher"
            )


def detect(environ: Mapping[str, str]) -> Topology:
    """The place of this process, from torchrun, Slurm or a Kubernetes indexed job; one process when none is seen.

    torchrun comes first, because `srun torchrun` sets both and torchrun's are the inner, right ones. A Slurm
    environment without SLURM_STEP_ID is an allocation's shell, not one of its tasks, and counts as one process.

    Raises:
        LaunchError: A launcher's variables are incomplete, not numbers, or contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and environ.get("SLURM_JOB_NAME") != "interactive":
        return _slurm(environ)
    if "JOB_COMPLETION_INDEX" in environ:
        index = _number(environ, "JOB_COMPLETION_INDEX")
        count = _number(environ, "JOB_COMPLETIONS")
        return Topology(launcher="kubernetes", rank=index, world_size=count, node_rank=index, num_nodes=count)
    return Topology()


def _torchrun(environ: Mapping[str, str]) -> Topology:
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", 1)
    if local_world_size < 1 or world_size % local_world_size:
        raise LaunchError(f"WORLD_SIZE={world_size} is not a multiple of LOCAL_WORLD_SIZE={local_world_size}")
    local_rank = _number(environ, "LOCAL_RANK", rank % local_world_size)
    node_rank = _number(environ, "GROUP_RANK", _number(environ, "NODE_RANK", rank // local_world_size))
    if rank != node_rank * local_world_size + local_rank:
        raise LaunchError(
            f"RANK={rank} is not node rank x local world size + local rank = {node_rank} x {local_world_size} + "
            f"{local_rank}; unset stale variables or start through one launcher"
        )
    return Topology(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        num_nodes=world_size // local_world_size,
    )


def _slurm(environ: Mapping[str, str]) -> Topology:
    # SLURM_STEP_TASKS_PER_NODE is "2(x3),1": two tasks on each of three nodes, one on the last.
    per_node: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1")).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE has the part {part!r}; expected a form like 2(x3)")
        per_node += [int(match[1])] * int(match[2] or 1)
    node_rank = _number(environ, "SLURM_NODEID", 0)
    if node_rank >= len(per_node):
        raise LaunchError(f"SLURM_NODEID={node_rank} is beyond the {len(per_node)} nodes of the step")
    return Topology(
        launcher="slurm",
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1)),
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        local_world_size=per_node[node_rank],
        node_rank=node_rank,
        num_nodes=len(per_node),
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None:
        if default is None:
            raise LaunchError(f"{name} is not set, though its launcher's other variables are; set it or unset them")
        return default
    try:
        return int(value)
    except ValueError as error:
        raise LaunchError(f"{name}={value!r} is not a whole number") from error


def granted_cpus(environ: Mapping[str, str], cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs this process may use: the least of its affinity, its cgroup quota and its Slurm grant; at least 1.

    The machine's count is not asked: on a shared node it is the neighbours' too.
    """
    counts = [len(os.sched_getaffinity(0))]
    quota = _cgroup_quota(cgroup_root)
    if quota is not None:
        counts.append(quota)
    if "SLURM_CPUS_PER_TASK" in environ:
        counts.append(_number(environ, "SLURM_CPUS_PER_TASK"))
    return max(1, min(counts))


def _cgroup_quota(root: Path) -> int | None:
    """Whole CPUs of the cgroup's quota (v2 cpu.max, v1 cpu.cfs_*), rounded down, or None when there is no limit."""
    try:
        if (root / "cpu.max").is_file():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    if limit in ("max", "-1"):
        return None
    return max(1, int(limit) // int(period))


def node_name(environ: Mapping[str, str]) -> str:
    """This node's name as a folder name: letters, digits, dot, dash and underscore."""
    name = environ.get("SLURMD_NODENAME") or socket.gethostname()
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-") or "node"
