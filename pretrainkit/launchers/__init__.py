"""Who starts the processes of a run.

Comes in: the configuration, and the name of the function each process runs. Goes out: that function's end in every
process. Guarantees: every process finds torchrun's variables in its environment, whoever started it, so that there is
one way to learn one's rank; a launcher's name in the registry and its file are all that adds one.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import LaunchError, PretrainKitError
from pretrainkit.registry import Registry
from pretrainkit.topology import Topology, detect

LAUNCHERS = Registry(
    "launcher",
    {
        "local": "pretrainkit.launchers.local:launch",
        "torchrun": "pretrainkit.launchers.torchrun:launch",
        "slurm": "pretrainkit.launchers.slurm:launch",
        "ray": "pretrainkit.launchers.ray:launch",
    },
)
# Signals to the process that started the others which those hear of.
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Ctrl+C is often heard twice: from the terminal, and from who started us, such as torchrun or `timeout`. Source:
# coreutils timeout.c, cleanup: to the command, then to the whole group.
_ONE_PRESS_S = 0.5
# Where `ray start` notes the cluster this machine belongs to. Source: ray/_private/utils.py, read_ray_address.
_RAY_NOTE = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - Ray's choice


def launch(entry: str, config: PretrainConfig) -> None:
    """Run a function in every process of a run; returns when it has ended everywhere that this process answers for.

    Args:
        entry: "module:function", called with the configuration and with when the run began, in `time.monotonic()` of
            its machine.
        config: Says how many processes, and who starts them.

    Raises:
        LaunchError: The processes cannot be started, or the environment contradicts the configuration.
    """
    begun = time.monotonic()  # before PyTorch is imported
    LAUNCHERS.get(choose(config, os.environ))(entry, config, begun)


def choose(config: PretrainConfig, environ: Mapping[str, str], ray_note: Path = _RAY_NOTE) -> str:
    """The launcher to use: the one asked for, the one whose variables are here, Ray for several nodes, or none.

    Raises:
        LaunchError: Several nodes and nobody to start processes on them, or a launcher that did not start us.
    """
    place = detect(environ)
    started_by = place.launcher if place.launcher != "none" else None
    if config.launcher in ("torchrun", "slurm") and started_by != config.launcher:
        raise LaunchError(f"launcher={config.launcher}, but it did not start this process; {_how(config.launcher)}")
    if config.launcher != "auto":
        return config.launcher
    if started_by == "kubernetes":
        raise LaunchError(f"an indexed job gives each pod a number, but no address; {_how('torchrun')} in each pod")
    if started_by is not None:
        _check_nodes(config, place)
        return started_by
    if config.num_nodes == 1:
        return "local"
    if "RAY_ADDRESS" in environ or ray_note.is_file():
        return "ray"
    raise LaunchError(
        f"num_nodes={config.num_nodes}, but nothing here starts processes on other machines; {_how('torchrun')}, "
        f"{_how('slurm')}, or run this on the head node of a Ray cluster"
    )


def _how(launcher: str) -> str:
    commands = {
        "torchrun": "start it with torchrun --nnodes=N --nproc_per_node=GPUS --rdzv_backend=c10d "
        "--rdzv_endpoint=HOST:29500 distributed_pretrain.py ...",
        "slurm": "start it with srun --nodes=N --ntasks-per-node=GPUS python distributed_pretrain.py ...",
    }
    return commands[launcher]


def _check_nodes(config: PretrainConfig, place: Topology) -> None:
    """Refuse a number of nodes or devices that is not what was started."""
    if config.num_nodes not in (1, place.num_nodes):
        raise LaunchError(
            f"num_nodes={config.num_nodes}, but {place.launcher} started {place.num_nodes}; make them equal or leave "
            "num_nodes out"
        )
    if config.devices not in ("auto", place.local_world_size):
        raise LaunchError(
            f"devices={config.devices}, but {place.launcher} started {place.local_world_size} processes per node; make "
            "them equal or leave devices out"
        )


def run_entry(entry: str, config: PretrainConfig, begun: float) -> None:
    """Import and call "module:function"."""
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(config, begun)


def pack_error(error: PretrainKitError) -> bytes:
    """An error of a training process for the one that started it."""
    return pickle.dumps((type(error), str(error), error.exit_code))


def unpack_error(packed: bytes) -> PretrainKitError:
    """The error again, of the same class and with the same exit code."""
    kind, message, exit_code = pickle.loads(packed)  # noqa: S301 - from our own child
    error: PretrainKitError = kind.__new__(kind, message)
    error.exit_code = exit_code
    return error


_stop_asked: list[int] = []  # the signal's number, in a process that was asked
_training_listens = threading.Event()


def ask_to_stop(number: int) -> None:
    """Stop training in this process as that signal would; for launchers whose processes no signal can reach."""
    _stop_asked.append(number)


def stop_asked() -> int:
    """The number of the signal that `ask_to_stop` stands for, or 0."""
    return _stop_asked[0] if _stop_asked else 0


def begin_to_listen() -> None:
    """From now on training looks at `stop_asked`; before, there is nothing to save and no need to wait."""
    _training_listens.set()


def training_listens() -> bool:
    """Whether `begin_to_listen` was called."""
    return _training_listens.is_set()


def is_second_press(number: int, heard: list[tuple[int, float]]) -> bool:
    """Note a signal in `heard`; whether it is a second Ctrl+C, and not the first one heard twice."""
    now = time.monotonic()
    first = next((when for other, when in heard if other == signal.SIGINT), now)
    heard.append((number, now))
    return number == signal.SIGINT and now - first > _ONE_PRESS_S
