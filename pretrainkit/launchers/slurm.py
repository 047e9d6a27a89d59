"""Started by srun: Slurm's variables become torchrun's.

Comes in: the environment of a task of a step. Goes out: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK,
MASTER_ADDR and MASTER_PORT, the same address and port in every task.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import LaunchError
from pretrainkit.launchers import run_entry
from pretrainkit.topology import Topology, detect

_FIRST_PORT, _PORTS = 15_000, 20_000  # below the range from which systems take ports for outgoing connections


def launch(entry: str, config: PretrainConfig, begun: float) -> None:
    """Run in this process, after translating the environment.

    Raises:
        LaunchError: Slurm's variables are incomplete, or its nodes' names lead nowhere.
    """
    translated = torchrun_variables(os.environ)
    address = translated["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:  # PyTorch would go on trying for many minutes without a word
        raise LaunchError(
            f"the first node's name {address!r} leads to no address ({error}); set MASTER_ADDR"
        ) from error
    os.environ.update(translated)
    run_entry(entry, config, begun)


def torchrun_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set.

    Raises:
        LaunchError: The list of nodes is missing.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise LaunchError("SLURM_JOB_NODELIST is not set, though Slurm's other variables are; start through srun")
    job = int(environ.get("SLURM_JOB_ID", "0")) * 7 + int(environ.get("SLURM_STEP_ID", "0"))
    port = environ.get("MASTER_PORT", str(_FIRST_PORT + job % _PORTS))
    return variables(detect(environ), environ.get("MASTER_ADDR", first_host(nodes)), port)


def variables(place: Topology, address: str, port: str | int) -> dict[str, str]:
    """The variables of torchrun for a process at this place."""
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "GROUP_RANK": str(place.node_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """First name in Slurm's short form of a list of hosts.

    Example:
        >>> first_host("gpu[07-09,12],cpu1")
        'gpu07'
    """
    match = re.match(r"([^,\[]+)(?:\[(\d+))?(?:[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise LaunchError(f"SLURM_JOB_NODELIST={nodes!r} has no first host; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
