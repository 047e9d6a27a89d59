"""Executors: the same bytes from each of them, whatever dies on the way, and nobody left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrainkit.errors import DatasetError, LaunchError
from pretrainkit.executors.local import LocalExecutor
from pretrainkit.merge import merge_datasets
from pretrainkit.metadata import DatasetInfo
from pretrainkit.optimize import optimize_dataset
from pretrainkit.plan import PLAN_FILENAME, Plan
from pretrainkit.units.nodes import finished_units
from tests.conftest import make_texts, write_parquet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def input_dir(tmp_path_factory):
    """Enough text for a dozen units of a few milliseconds."""
    folder = tmp_path_factory.mktemp("executors")
    for index in range(4):
        write_parquet(folder / f"{index}.parquet", make_texts(300, seed=index), row_group_size=50)
    return folder


FLAGS = {"unit_bytes": 60_000, "val_fraction": 0.1, "engine": "gigatoken", "boundary": "eos"}


@pytest.fixture(scope="module")
def expected(input_dir, tokenizer_dir, tmp_path_factory):
    """The chunks and records that one process makes."""
    output_dir = tmp_path_factory.mktemp("expected") / "out"
    optimize_dataset(tokenizer_dir, output_dir, input_dir, num_workers=0, **FLAGS)
    return digests(output_dir)


def digests(output_dir):
    """(split, file) -> hash of every chunk and record, whichever node folder it lies in; equal where it lies twice."""
    found = {}
    for path in sorted(Path(output_dir).glob("*/*/chunk-*.bin")) + sorted(Path(output_dir).glob("*/*/units/*.json")):
        split, _, name = path.relative_to(output_dir).as_posix().split("/", 2)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.setdefault((split, name), digest) == digest, path
    return found


def command(input_dir, tokenizer_dir, output_dir, *more):
    flags = {**FLAGS, "input_dir": input_dir, "tokenizer_dir": tokenizer_dir, "output_dir": output_dir}
    return [sys.executable, "optimize_dataset.py", *[f"--{key}={value}" for key, value in flags.items()], *more]


def processes_naming(text):
    """Process ids whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def children_of(pid):
    """Process ids whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition, timeout_s=60):
    """Poll: the processes under test cannot tell us."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_is_nothing_to_a_worker_from_its_first_moment_on(tokenizer_dir):
    with LocalExecutor(1, None).warm_up(str(tokenizer_dir), (), 1):
        (worker,) = children_of(os.getpid())
        status = dict(line.split(":\t") for line in Path(f"/proc/{worker}/status").read_text().splitlines())
        assert int(status["SigBlk"], 16) & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(
    "num_workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_any_number_of_workers_makes_the_same_bytes(input_dir, tokenizer_dir, tmp_path, expected, num_workers):
    optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=num_workers, **FLAGS)
    assert digests(tmp_path / "out") == expected


def test_three_static_ranks_on_two_nodes_make_the_same_bytes(input_dir, tokenizer_dir, tmp_path, expected, monkeypatch):
    for rank in (2, 0, 1):
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("SLURMD_NODENAME", f"node{rank % 2}")
        summary = optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=0, **FLAGS)
    assert summary.units == summary.units_planned
    assert digests(tmp_path / "out") == expected
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == ["node0", "node1"]
    assert len(list((tmp_path / "out").glob("*/*/index.json"))) == 4


def pod(index, completions):
    """The environment of one pod of an indexed job; all pods have one host name here, so the node's is given."""
    return {"JOB_COMPLETION_INDEX": str(index), "JOB_COMPLETIONS": str(completions), "SLURMD_NODENAME": f"pod-{index}"}


def test_units_of_a_rank_that_never_came_are_named_by_merge_and_other_ranks_can_do_them(
    input_dir, tokenizer_dir, tmp_path, expected, monkeypatch
):
    def run(index, completions):
        for name, value in pod(index, completions).items():
            monkeypatch.setenv(name, value)
        return optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=0, **FLAGS)

    for index in (2, 0):  # nobody waits for the one that is missing
        summary = run(index, 3)
    assert summary.units < summary.units_planned
    with pytest.raises(DatasetError, match=r"of the plan's \d+ units are missing \(unit 1, 4, .*found pod-0, pod-2"):
        merge_datasets(tmp_path / "out/train", tmp_path / "merged/train")
    assert not (tmp_path / "merged/train").exists()
    for index in range(2):
        summary = run(index, 2)
    assert summary.units == summary.units_planned
    assert digests(tmp_path / "out") == expected
    for split in ("train", "val"):
        merge_datasets(tmp_path / "out" / split, tmp_path / "merged" / split)
    merged = [DatasetInfo.load(tmp_path / "merged" / split).documents for split in ("train", "val")]
    assert sum(merged) == 4 * 300


@pytest.mark.parametrize("environ", [{"JOB_COMPLETION_INDEX": "0"}, pod(3, 3)], ids=["no count", "beyond the count"])
def test_a_pod_that_does_not_know_its_place_is_refused_before_any_work(
    input_dir, tokenizer_dir, tmp_path, environ, monkeypatch
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="JOB_COMPLETIONS|rank 3 of 3"):
        optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=0, **FLAGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [1, 5, 9])
def test_a_killed_driver_takes_its_workers_along_and_the_next_one_goes_on(
    input_dir, tokenizer_dir, tmp_path, expected, kill_after
):
    arguments = command(input_dir, tokenizer_dir, tmp_path / "out", "--num_workers=2")
    driver = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE)
    wait_until(lambda: len(list((tmp_path / "out").glob("train/*/units/*.json"))) >= kill_after or driver.poll() == 0)
    workers = children_of(driver.pid)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not any(alive(pid) for pid in workers), timeout_s=5)
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert digests(tmp_path / "out") == expected
    assert not list((tmp_path / "out").rglob(".stage-*"))


@pytest.mark.slow
def test_killed_workers_are_replaced_and_nothing_is_lost(input_dir, tokenizer_dir, tmp_path, expected):
    arguments = command(input_dir, tokenizer_dir, tmp_path / "out", "--num_workers=2")
    driver = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "out").glob("train/*/units/*.json")))
    os.kill(children_of(driver.pid)[0], signal.SIGKILL)
    _, log = driver.communicate(timeout=60)
    assert driver.returncode == 0, log
    assert "SIGKILL; out of memory?); trying again" in log
    assert digests(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_says_how_to_go_on(input_dir, tokenizer_dir, tmp_path, number):
    arguments = command(input_dir, tokenizer_dir, tmp_path / "out", "--num_workers=2")
    driver = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "out").glob("train/*/units/*.json")))
    workers = children_of(driver.pid)
    start = time.monotonic()
    driver.send_signal(number)
    _, log = driver.communicate(timeout=10)
    assert time.monotonic() - start < 5
    assert driver.returncode == 128 + number
    assert f"stopped by {number.name}; what is finished in" in log
    assert "run the same command again to go on" in log
    assert not any(alive(pid) for pid in workers)


@pytest.mark.slow
def test_a_unit_that_kills_its_worker_three_times_is_named(input_dir, tokenizer_dir, tmp_path, monkeypatch):
    # Workers are started anew each time; this one dies of a module that ends the process on the second unit.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'pretrainkit.executors.worker' in ' '.join(sys.orig_argv):\n"
        "    import pretrainkit.units.runner as unit\n"
        "    encode = unit.UnitRunner._encode\n"
        "    unit.UnitRunner._encode = lambda self, index, *_: os._exit(9) if index == 1 else encode(self, index, *_)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(LaunchError, match=r"3 workers died on unit 1 \(exit code 9\)"):
        optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=1, **FLAGS)
    plan = Plan.from_json((tmp_path / "out" / PLAN_FILENAME).read_text())
    assert 0 in finished_units(str(tmp_path / "out"), plan)


def test_workers_default_to_the_cpus_granted(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert LocalExecutor(None, None)._num_workers == 1


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_ray_makes_the_same_bytes_on_several_nodes_and_when_one_dies(input_dir, tokenizer_dir, tmp_path, expected):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        driver = subprocess.Popen(
            command(input_dir, tokenizer_dir, tmp_path / "out", "--executor=ray", f"--ray_address={cluster.address}"),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: list((tmp_path / "out").glob("train/*/units/*.json")) or driver.poll() is not None, 120)
        cluster.remove_node(nodes[0], allow_graceful=False)
        _, log = driver.communicate(timeout=120)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert driver.returncode == 0, log
    assert digests(tmp_path / "out") == expected


def test_ray_leaves_sigterm_to_the_job(monkeypatch):
    from pretrainkit.executors import ray as executor

    class Ray:
        """Does at its start what Ray does: `sigterm_handler` in ray/_private/worker.py."""

        @staticmethod
        def is_initialized():
            return False

        @staticmethod
        def init(**_):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        @staticmethod
        def shutdown():
            pass

    class Tasks:
        def __init__(self, *_):
            pass

        def run(self, _):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    monkeypatch.setitem(sys.modules, "ray", Ray)
    monkeypatch.setattr(executor, "_Tasks", Tasks)
    ours = signal.getsignal(signal.SIGTERM)
    executor.RayExecutor(None, "somewhere").run(None, [0], print)
    assert seen == [ours] == [signal.getsignal(signal.SIGTERM)]


TELL_NOBODY = """
import socket
from multiprocessing.connection import Connection
from pretrainkit.executors.worker import _tell
ours, theirs = socket.socketpair()
theirs.close()
_tell(Connection(ours.detach()), OSError("a full disk"))
"""


def test_a_worker_whose_driver_has_ended_says_nothing():
    done = subprocess.run([sys.executable, "-c", TELL_NOBODY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
