"""Ray Train: from the head node of a cluster, one process per device of each node.

Guarantees: Ray restarts a run that a dead process or node ended, and it goes on from its newest whole checkpoint; a
mistake of the user's ends it at once; a signal to this process reaches the workers, which finish the step and save; the
processes find torchrun's variables; no secret of this environment is put into Ray's runtime environment, which Ray
writes into logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pretrainkit
from pretrainkit.config import PretrainConfig
from pretrainkit.errors import TRY_AGAIN, ConfigError, LaunchError, PretrainKitError
from pretrainkit.launchers import PASSED_ON, ask_to_stop, is_second_press, pack_error, run_entry, unpack_error
from pretrainkit.storage import is_remote

logger = logging.getLogger(__name__)

MAX_FAILURES = 10  # restarts of a run by Ray
_POLL_S = 1.0  # how often a worker asks whether to stop


def launch(entry: str, config: PretrainConfig, begun: float) -> None:  # noqa: ARG001 - workers have their clocks
    """Run on `num_nodes` x `devices` workers of the cluster this machine belongs to.

    Raises:
        ConfigError: Ray is not installed, or the run's folder holds a run that nobody asked to go on with.
        LaunchError: There is no cluster, or it has too few nodes or devices, or the run failed too often.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(f"launcher=ray needs {error.name}; pip install 'pretrainkit[ray]'") from error
    _check_folder(config)
    # A restart must go on, not begin: that is what auto means, and it begins where there is nothing.
    config = dataclasses.replace(with_absolute_paths(config), resume="auto")
    if not ray.is_initialized():
        package = Path(pretrainkit.__file__).parent
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), runtime_env={"py_modules": [str(package)]})
        except ConnectionError as error:
            raise LaunchError(
                f"no Ray cluster can be reached ({error}); start one with `ray start --head` here and `ray start "
                "--address=HEAD:6379` on the other nodes, or set RAY_ADDRESS"
            ) from error
    per_node, use_gpu = _workers_per_node(config, ray.nodes())
    scaling = ScalingConfig(
        num_workers=config.num_nodes * per_node,
        use_gpu=use_gpu,
        placement_strategy="SPREAD" if per_node == 1 else "PACK",
    )
    stop_key = f"pretrainkit-stop-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="ray-train-") as notes:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"entry": entry, "config": config, "stop_key": stop_key},
            scaling_config=scaling,
            run_config=RunConfig(
                name=config.out_dir.name, storage_path=notes, failure_config=FailureConfig(max_failures=MAX_FAILURES)
            ),
        )
        with _telling_workers_to_stop(stop_key):
            _fit(trainer)


def _fit(trainer: Any) -> None:
    """Run to the end, in a thread of its own: in the main one Ray would take Ctrl+C for itself and save nothing.

    Raises:
        PretrainKitError: What ended training in the workers, or that the run failed too often.
    """
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit().return_value)
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        cause = str(outcome[0]).strip().splitlines() or [type(outcome[0]).__name__]
        failure = LaunchError(f"the run failed on Ray: {cause[-1]}; its log is above")
        failure.exit_code = exit_code(outcome[0])
        raise failure from outcome[0]
    if outcome[0] is not None:
        raise unpack_error(outcome[0])


def exit_code(failure: Exception) -> int:
    """75 when a worker or its node was lost, 1 when training raised, as Python has it; 2 when Ray could not begin."""
    # Source: ray/train/v2/api/exceptions.py, WorkerGroupError; what training raised is wrapped in a class of this name.
    kinds = [type(worker).__name__ for worker in getattr(failure, "worker_failures", {}).values()]
    if any(kind != "UserExceptionWithTraceback" for kind in kinds):  # the others failed because it was gone
        return TRY_AGAIN
    return 1 if kinds else LaunchError.exit_code


@contextlib.contextmanager
def _telling_workers_to_stop(key: str) -> Iterator[None]:
    """Leave the number of the first signal where the workers look for it; a second Ctrl+C interrupts at once."""
    from ray.experimental.internal_kv import _internal_kv_put

    heard: list[tuple[int, float]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if is_second_press(number, heard):
            signal.default_int_handler(number, frame)
        _internal_kv_put(key, str(heard[0][0]))

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in PASSED_ON} if in_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_folder(config: PretrainConfig) -> None:
    if isinstance(config.resume, Path):
        raise ConfigError("launcher=ray restarts from the newest checkpoint in out_dir; use --resume=auto")
    if config.resume is False and any(config.out_dir.glob("*/manifest.json")):
        raise ConfigError(
            f"{config.out_dir} already holds a run; add --resume=auto to go on, or give another --out_dir"
        )


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The same run seen from another working folder, which Ray's workers have."""
    schedule = config.schedule
    if schedule.decay_from is not None:
        schedule = dataclasses.replace(schedule, decay_from=schedule.decay_from.absolute())
    initial, tokenizer = config.initial_checkpoint_dir, config.tokenizer_dir
    return dataclasses.replace(
        config,
        out_dir=config.out_dir.absolute(),
        dataset_path=None if config.dataset_path is None else _absolute(config.dataset_path),
        data=dataclasses.replace(
            config.data, sources={_absolute(path): weight for path, weight in config.data.sources.items()}
        ),
        schedule=schedule,
        initial_checkpoint_dir=None if initial is None else initial.absolute(),
        tokenizer_dir=None if tokenizer is None else tokenizer.absolute(),
    )


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


def _workers_per_node(config: PretrainConfig, nodes: list[dict[str, Any]]) -> tuple[int, bool]:
    """(workers per node, whether they use GPUs).

    Raises:
        LaunchError: Fewer nodes than asked for.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if len(alive) < config.num_nodes:
        raise LaunchError(
            f"num_nodes={config.num_nodes}, but the Ray cluster has {len(alive)}; add nodes or ask for less"
        )
    gpus = sorted((int(resources.get("GPU", 0)) for resources in alive), reverse=True)[config.num_nodes - 1]
    per_node = max(1, gpus) if config.devices == "auto" else config.devices
    if gpus and per_node > gpus:
        raise LaunchError(f"devices={config.devices}, but only {gpus} GPUs are on each of {config.num_nodes} nodes")
    return per_node, gpus > 0


def _work(arguments: dict[str, Any]) -> bytes | None:
    """One worker. Ray has set RANK, WORLD_SIZE and the like; what it calls NODE_RANK, torchrun calls GROUP_RANK.

    Returns:
        None, or the error that ended training. Returned, not raised: Ray would start the same mistake again and again.
    """
    from ray.train import get_context

    context = get_context()
    os.environ["GROUP_RANK"] = str(context.get_node_rank())
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begun = time.monotonic()
    threading.Thread(target=_listen, args=(arguments["stop_key"],), name="stop", daemon=True).start()
    try:
        run_entry(arguments["entry"], arguments["config"], begun)
    except PretrainKitError as error:
        logger.error("error: %s", error)  # noqa: TRY400 - a mistake of the user's has no traceback
        return pack_error(error)
    return None


def _listen(key: str) -> None:
    """Wait until the driver asks to stop, then pass it on to training."""
    from ray.experimental.internal_kv import _internal_kv_get

    while (number := _internal_kv_get(key)) is None:
        time.sleep(_POLL_S)
    ask_to_stop(int(number))
