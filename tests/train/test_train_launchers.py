"""Who starts the processes: the choice, the translation of variables, and real processes under each launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import LaunchError
from pretrainkit.launchers import choose, launch
from pretrainkit.launchers.slurm import first_host, torchrun_variables

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
SLURM = {
    "SLURM_PROCID": "3", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "10",
}  # fmt: skip
KUBERNETES = {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}


def config(**changes) -> PretrainConfig:
    return PretrainConfig(**{"model_name": "pythia-14m", "dataset_path": "data"} | changes)


@pytest.mark.parametrize(
    ("changes", "environ", "expected"),
    [
        ({}, {}, "local"),
        ({"devices": 4}, {}, "local"),
        ({}, TORCHRUN, "torchrun"),
        ({}, SLURM, "slurm"),
        ({}, SLURM | TORCHRUN, "torchrun"),
        ({"num_nodes": 2}, TORCHRUN, "torchrun"),
        ({"num_nodes": 4}, {"RAY_ADDRESS": "auto"}, "ray"),
        ({"launcher": "ray"}, {}, "ray"),
    ],
)
def test_the_launcher_follows_from_the_flag_and_the_environment(changes, environ, expected, tmp_path):
    assert choose(config(**changes), environ, tmp_path / "none") == expected


@pytest.mark.parametrize(
    ("changes", "environ", "message"),
    [
        ({"num_nodes": 4}, {}, "nothing here starts processes on other machines; start it with torchrun"),
        ({"num_nodes": 3}, TORCHRUN, "num_nodes=3, but torchrun started 2"),
        ({"devices": 4}, SLURM, "devices=4, but slurm started 2 processes per node"),
        ({"launcher": "slurm"}, {}, "launcher=slurm, but it did not start this process; start it with srun"),
        ({}, KUBERNETES, "start it with torchrun"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_with_the_way_out(changes, environ, message, tmp_path):
    with pytest.raises(LaunchError, match=message):
        choose(config(**changes), environ, tmp_path / "none")


def test_ray_without_a_cluster_is_one_line(monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")

    def unreachable(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(LaunchError, match="no Ray cluster can be reached .*; start one with `ray start --head`"):
        launch("a:b", config(launcher="ray", out_dir=tmp_path))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("gpu[07-09,12],cpu1", "gpu07"), ("a-b[3,5]", "a-b3"), ("n1,n2", "n1"), ("r[1-2]n", "r1n")],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_slurms_variables_become_torchruns():
    assert torchrun_variables(SLURM) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "15072",
    }  # fmt: skip


def write_config(settings, tmp_path: Path, **changes) -> list[str]:
    """The flags of a run as a user gives them: a file and an output folder."""
    import dataclasses

    from pretrainkit.train.state import config_to_dict

    arguments = settings(**changes)
    arguments.pop("launcher")
    arguments.pop("devices")
    content = config_to_dict(PretrainConfig(**arguments))
    keep = {field.name for field in dataclasses.fields(PretrainConfig)} & arguments.keys()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({key: content[key] for key in keep}))
    return ["distributed_pretrain.py", f"--config={path}"]


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def losses(folder: Path, name: str = "loss") -> list[float]:
    parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in parsed if name in row]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_local_processes_and_one_process_train_alike(settings, tmp_path):
    flags = write_config(settings, tmp_path, train={"max_steps": 4}, eval={"final_validation": True, "max_iters": 1000})
    torchrun = str(Path(sys.executable).parent / "torchrun")
    commands = {
        "one": [sys.executable, *flags],
        "local": [sys.executable, *flags, "--devices=2"],
        "torchrun": [torchrun, "--standalone", "--nproc_per_node=2", *flags],
    }
    for name, command in commands.items():
        result = run([*command, f"--out_dir={tmp_path / name}"])
        assert result.returncode == 0, result.stderr
    first = losses(tmp_path / "one")
    assert losses(tmp_path / "local") == pytest.approx(first, rel=1e-5)
    assert losses(tmp_path / "torchrun") == pytest.approx(first, rel=1e-5)
    assert losses(tmp_path / "local", "val_loss") == pytest.approx(losses(tmp_path / "one", "val_loss"), rel=1e-5)
    compared = run(
        [sys.executable, "scripts/verify_resume.py", str(tmp_path / "one"), str(tmp_path / "local"), "--tolerance=1e-5"]
    )
    assert compared.returncode == 0, compared.stderr
    assert "4 steps in common: the same data" in compared.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_in_a_local_process_is_one_line_and_leaves_no_process(settings, tmp_path):
    flags = write_config(settings, tmp_path, train={"global_batch_size": 4})
    result = run([sys.executable, *flags, "--devices=2", f"--out_dir={tmp_path / 'run'}"])
    assert result.returncode == 2
    assert "error: train.global_batch_size=4 is not a multiple of micro_batch_size x world_size = 4 x 2; use 8" in (
        result.stderr
    )
    assert "Traceback" not in result.stderr


RAY_SCRIPT = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pretrainkit.config import *
from pretrainkit.train import pretrain

settings = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address)
pretrain(
    model_config=settings["model_config"], dataset_path=settings["dataset_path"], out_dir=Path(settings["out_dir"]),
    train=TrainConfig(global_batch_size=16, micro_batch_size=4, max_steps=4, lr_warmup_steps=2, min_lr=1e-4),
    eval=EvalConfig(interval=None, final_validation=False),
    optimizer=OptimizerConfig(init_args=OptimizerArgs(lr=1e-2)),
    launcher="ray", num_nodes=2, devices=1,
)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_ray_trains_on_two_nodes_like_one_process(settings, tmp_path):
    from pretrainkit.train import pretrain

    alone = settings(train={"max_steps": 4}, out_dir=tmp_path / "one")
    pretrain(**alone)
    values = {
        "model_config": alone["model_config"],
        "dataset_path": alone["dataset_path"],
        "out_dir": str(tmp_path / "ray"),
    }
    script = tmp_path / "on_ray.py"
    script.write_text(RAY_SCRIPT)
    result = run([sys.executable, str(script), json.dumps(values)], PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
