"""Training on Ray nodes on this machine: workers are killed, a node goes while another joins, somebody asks to stop.

Moments are told by progress, not by the clock: a case waits for a checkpoint and some steps beyond it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_train_launchers import write_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 120, 20
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "digest", "tokens")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    """A head that only directs; nodes with one CPU each come and go."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Two nodes; what is in the list at the end is removed again."""
    present = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield present
    for node in present:
        cluster.remove_node(node)


def command(settings, folder: Path, *flags: str, **changes: Any) -> list[str]:
    """The command as a user gives it."""
    train = {"max_steps": STEPS, "save_interval": SAVE_EVERY} | changes.pop("train", {})
    given = write_config(settings, folder.parent, train=train, out_dir=folder, **changes)
    return [sys.executable, *given, *flags]


def start(arguments: list[str], log: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with open(log, "a") as file:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True)


def start_on_ray(cluster, settings, folder: Path, **changes: Any) -> subprocess.Popen[str]:
    arguments = command(settings, folder, "--launcher=ray", "--num_nodes=2", "--devices=1", **changes)
    return start(arguments, folder.with_suffix(".log"), RAY_ADDRESS=cluster.address)


def train_undisturbed(settings, folder: Path) -> None:
    """The same run in two processes without Ray, which takes nodes of one address, as these are, for one node."""
    driver = start(command(settings, folder, "--devices=2"), folder.with_suffix(".log"))
    assert driver.wait(timeout=600) == 0, folder.with_suffix(".log").read_text()


def rows(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl so far."""
    try:
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [row for row in map(json.loads, lines) if row["event"] == event]


def wait_until_step(folder: Path, step: int, driver: subprocess.Popen[str]) -> None:
    while driver.poll() is None and all(row["step"] != step for row in rows(folder)[-50:]):
        time.sleep(0.01)
    assert driver.poll() is None, folder.with_suffix(".log").read_text()


def training_workers() -> list[int]:
    """Processes of Ray Train's workers; Ray names them after their class."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and "ray::RayTrainWorker" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def test_ray_restarts_a_run_whose_worker_and_whose_node_died_and_no_bit_differs(cluster, nodes, settings, tmp_path):
    train_undisturbed(settings, tmp_path / "undisturbed")
    run = tmp_path / "run"
    driver = start_on_ray(cluster, settings, run)
    try:
        wait_until_step(run, SAVE_EVERY + 8, driver)
        os.kill(training_workers()[-1], signal.SIGKILL)
        wait_until_step(run, 3 * SAVE_EVERY + 8, driver)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1))
        assert driver.wait(timeout=600) == 0, run.with_suffix(".log").read_text()
    finally:
        driver.kill()
    first, second = (row["step"] for row in rows(run, "resume"))
    assert first % SAVE_EVERY == second % SAVE_EVERY == 0
    # A save or two may still have ended while the worker, or the node, was on its way out.
    assert SAVE_EVERY <= first < 3 * SAVE_EVERY <= second < STEPS
    expected = {row["step"]: {key: row[key] for key in COMPARED} for row in rows(tmp_path / "undisturbed")}
    assert sorted(expected) == list(range(1, STEPS + 1))
    # Steps between a checkpoint and a death were computed twice, with the same result.
    assert [row["step"] for row in rows(run)].count(first + 1) == 2
    assert {row["step"] for row in rows(run)} == set(expected)
    for row in rows(run):
        assert {key: row[key] for key in COMPARED} == expected[row["step"]]
    final = json.loads((run / "final" / "state.json").read_text())["state"]
    assert (final["step"], final["restarts"]) == (STEPS, 2)


def test_a_signal_to_the_driver_lets_the_workers_save_and_a_mistake_is_not_tried_again(
    cluster, nodes, settings, tmp_path
):
    run = tmp_path / "run"
    driver = start_on_ray(cluster, settings, run, train={"max_steps": 100_000, "save_interval": None})
    try:
        wait_until_step(run, 5, driver)
        driver.send_signal(signal.SIGUSR1)
        assert driver.wait(timeout=120) == 128 + signal.SIGUSR1
        (stop,) = rows(run, "stop")
        assert (run / f"step-{stop['step']:08d}" / "manifest.json").is_file()
        assert f"stopped by SIGUSR1 after step {stop['step']}; saved" in run.with_suffix(".log").read_text()

        driver = start_on_ray(cluster, settings, tmp_path / "wrong", train={"global_batch_size": 4})
        assert driver.wait(timeout=120) == 2
        log = (tmp_path / "wrong.log").read_text()
        assert log.count("error: train.global_batch_size=4 is not a multiple of") == 3  # two workers, and the end
        assert "\nerror: train.global_batch_size=4" in log
    finally:
        driver.kill()
