"""A Ray cluster of several nodes on this machine, one of which is switched off at seeded moments.

Moments are told by progress, not by the clock: a case waits for a seeded number of finished units and then kills.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrainkit import merge_datasets
from pretrainkit.optimize import optimize_dataset
from tests.chaos import oracle
from tests.conftest import make_texts, write_parquet

ROOT = Path(__file__).parents[2]
FLAGS = {"unit_bytes": 100_000, "engine": "tokenizers", "boundary": "eos", "chunk_bytes": 8192, "block_size": 65}

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def input_dir(tmp_path_factory):
    """Some forty units of slow work."""
    folder = tmp_path_factory.mktemp("chaos-ray")
    for index in range(4):
        write_parquet(folder / f"{index}.parquet", make_texts(1500, seed=index), row_group_size=150)
    return folder


@pytest.fixture(scope="module")
def expected(input_dir, tokenizer_dir, tmp_path_factory):
    """The merged dataset that one process makes."""
    home = tmp_path_factory.mktemp("undisturbed")
    optimize_dataset(tokenizer_dir, str(home / "out"), str(input_dir), num_workers=0, **FLAGS)
    merge_datasets(home / "out/train", home / "merged")
    return oracle.tree(home / "merged")


@pytest.fixture(scope="module")
def cluster():
    """A head that only directs; nodes come and go."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def finished(output_dir: Path) -> int:
    return len(list(output_dir.glob("train/*/units/*.json")))


def wait_for(condition, process, timeout_s=240):
    """Poll until the condition holds or the driver has ended; the cluster cannot tell us."""
    end = time.monotonic() + timeout_s
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ray_workers(unit_function="_run_unit") -> list[int]:
    """Processes that run a unit now, or wait for the next one; Ray names them after what they run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"ray::{unit_function}" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def start_driver(cluster, tokenizer_dir, input_dir, output_dir) -> subprocess.Popen:
    flags = {**FLAGS, "tokenizer_dir": tokenizer_dir, "input_dir": input_dir, "output_dir": output_dir}
    flags |= {"executor": "ray", "ray_address": cluster.address}
    command = [sys.executable, "optimize_dataset.py", *[f"--{key}={value}" for key, value in flags.items()]]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("victim", ["node", "worker", "driver"])
def test_a_death_on_the_cluster_changes_no_byte(cluster, tokenizer_dir, input_dir, expected, tmp_path, victim):
    generator = random.Random(victim)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    output_dir = tmp_path / "out"
    moment = generator.randint(1, 20)
    driver = start_driver(cluster, tokenizer_dir, input_dir, output_dir)
    try:
        wait_for(lambda: finished(output_dir) >= moment, driver)
        assert driver.poll() is None, driver.communicate()[0]
        if victim == "node":
            cluster.remove_node(nodes.pop(generator.randrange(2)), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))  # and another joins
        elif victim == "worker":
            os.kill(generator.choice(ray_workers()), signal.SIGKILL)
        else:
            driver.kill()
        said, _ = driver.communicate(timeout=300)
        if victim == "driver":
            assert driver.returncode == -signal.SIGKILL
            driver = start_driver(cluster, tokenizer_dir, input_dir, output_dir)
            said, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, said
    finally:
        driver.kill()
        for node in nodes:
            cluster.remove_node(node)
    merge_datasets(output_dir / "train", tmp_path / "merged")
    assert oracle.differences(oracle.tree(tmp_path / "merged"), expected) == []
    assert oracle.count_documents(output_dir / "train", 511) == 6000
