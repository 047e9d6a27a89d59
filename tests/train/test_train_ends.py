"""How a run on several local processes ends: the exit code, the one line, and what is saved; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import LaunchError
from tests.train.test_train_launchers import losses, write_config

ROOT = Path(__file__).resolve().parents[2]

# Training on two ranks in which rank 1 does as the first argument says at its third step.
FAILING = """
import os, signal, sys

def train(config, begun):
    from pretrainkit.errors import InputError
    from pretrainkit.train import loop, setup
    step = loop._step
    def failing(run, loader):
        if run.state.step == 2:
            if sys.argv[1] == "mistake":
                raise InputError("rank 1 alone sees this; mend it")
            if sys.argv[1] == "crash":
                raise ValueError("a fault of its own")
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        step(run, loader)
    if os.environ["RANK"] == "1":
        loop._step = failing
    setup.train_process(config, begun)

if __name__ == "__main__":
    from pretrainkit import cli, launchers
    launch = launchers.launch
    launchers.launch = lambda _, config: launch("failing:train", config)
    cli.run_command("pretrain", sys.argv[2:])
"""


@pytest.fixture
def start(settings, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a long run on two ranks, in a process group of its own as a shell's job is."""

    def begin(*flags: str, failing: str | None = None) -> subprocess.Popen[str]:
        script, *given = write_config(settings, tmp_path, train={"max_steps": 100_000, "epochs": 100_000})
        if failing is not None:
            script = str(tmp_path / "failing.py")
            Path(script).write_text(FAILING)
            given.insert(0, failing)
        return subprocess.Popen(
            [sys.executable, script, *given, "--devices=2", f"--out_dir={tmp_path / 'run'}", *flags],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return begin


def wait_for_steps(process: subprocess.Popen[str], run: Path) -> None:
    """Until three steps are done."""
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def rank_process(parent: int, rank: int) -> int:
    """The process id of a rank, which the kernel lists in the order of their starts."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()][rank]


def lines_beside_steps(output: str) -> list[str]:
    return [line for line in output.partition(", until ")[2].splitlines()[1:] if not line.startswith("step ")]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["all", "parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_or_to_the_parent_saves_once(start, tmp_path, send, number):
    process = start()
    wait_for_steps(process, tmp_path / "run")
    send(process.pid, number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    (line,) = lines_beside_steps(output)
    step = len(losses(tmp_path / "run"))
    assert line == f"stopped by {number.name} after step {step}; saved, go on with --resume=auto"
    assert (tmp_path / "run" / f"step-{step:08d}" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_second_ctrl_c_stops_at_once_whatever_the_ranks_do(start, tmp_path):
    process = start()
    wait_for_steps(process, tmp_path / "run")
    frozen = rank_process(process.pid, 1)
    os.kill(frozen, signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None, "the first one waits for the step"
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert lines_beside_steps(output) == [
        "stopped by SIGINT at once; go on from the last checkpoint with --resume=auto"
    ]
    assert not Path(f"/proc/{frozen}").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_is_killed_is_worth_trying_again(start, number):
    process = start(failing=number.name)
    output = process.communicate(timeout=100)[1]
    assert process.returncode == 75
    assert f"error: rank-1 was killed by signal {number}; its last lines are above. Resume with --resume=auto" in output
    assert "Connection closed" not in output


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_that_freezes_is_named_and_ends_the_run_soon(start, tmp_path):
    process = start("--compute.hang_timeout_s=3", failing="SIGSTOP")
    wait_for = time.monotonic()
    while not (tmp_path / "run" / "watchdog").exists():
        assert time.monotonic() - wait_for < 100
        time.sleep(0.05)
    gave_up = time.monotonic()
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert time.monotonic() - gave_up < 10  # half a timeout for rank 1's report, then two seconds
    silent, ended = lines_beside_steps(output)
    assert silent.startswith("error: rank 1 gave no sign for ")
    assert "; rank 0 waits for it in step 2 while computing; its stack is in " in silent
    assert ended.startswith("error: rank-0 ended with 75, which it does when a rank hangs; its last lines are above.")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_mistake_that_one_rank_finds_is_one_line(start):
    process = start(failing="mistake")
    output = process.communicate(timeout=100)[1]
    assert process.returncode == 2
    assert lines_beside_steps(output) == ["error: rank 1 alone sees this; mend it"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_crash_of_one_rank_shows_its_traceback_alone(start):
    process = start(failing="crash")
    output = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert output.count("Traceback (most recent call last)") == 1
    assert "ValueError: a fault of its own" in output
    assert "error: rank-1 ended with 1; its last lines are above" in output


def interrupted_first(config: PretrainConfig, begun: float) -> None:
    """A worker that was not yet listening: the terminal's Ctrl+C, then the parent's word."""
    os.kill(os.getpid(), signal.SIGINT)  # which a worker does not hear
    (config.out_dir / f"here-{os.environ['RANK']}").touch()
    time.sleep(60)


@pytest.mark.slow
def test_ctrl_c_before_training_ends_workers_without_a_word(tmp_path):
    script = f"""
from pathlib import Path
from pretrainkit import cli, config
from pretrainkit.launchers.local import launch
def run():
    "Run."
    settings = config.PretrainConfig(model_name="m", dataset_path="d", devices=2, out_dir=Path({str(tmp_path)!r}))
    launch("{__name__}:interrupted_first", settings, 0.0)
if __name__ == "__main__":
    cli.run_cli(run, [])
"""
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(list(tmp_path.glob("here-*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "stopped by SIGINT before training began\n"
    assert process.returncode == 130


def test_ctrl_c_while_a_command_is_imported_is_one_line(tmp_path):
    (tmp_path / "interrupted.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    script = f"""
import sys
sys.path.append({str(tmp_path)!r})
from pretrainkit import cli
from pretrainkit.registry import Registry
cli.COMMANDS = Registry("command", {{"slow": "interrupted:command"}})
cli.run_command("slow", [])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "stopped by Ctrl+C\n")


def test_what_a_run_on_ray_failed_of_decides_its_exit_code():
    from pretrainkit.launchers.ray import exit_code

    class UserExceptionWithTraceback(Exception):  # noqa: N818 - Ray's name
        """What training raised."""

    class GroupError(Exception):
        def __init__(self, *failures: Exception) -> None:
            self.worker_failures = dict(enumerate(failures))

    raised, lost = UserExceptionWithTraceback(), Exception("the worker died")
    assert exit_code(GroupError(raised, raised)) == 1
    assert exit_code(GroupError(raised, lost)) == 75
    assert exit_code(Exception("the controller failed")) == LaunchError.exit_code == 2


@pytest.mark.parametrize(("had_a_group", "ended"), [(True, "handlers"), (False, "handlers modules")])
def test_after_a_process_group_the_interpreter_is_not_taken_apart(had_a_group, ended):
    """Threads that want the GIL then would end the process with SIGABRT; see `pretrainkit.leave`."""
    script = f"""
import atexit, os
from pretrainkit.leave import leave, note_process_group

class Module:
    def __del__(self, say=os.write):
        say(1, b" modules")

module = Module()
atexit.register(print, "handlers", end="")
if {had_a_group}:
    note_process_group()
leave(3)
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, sorted(process.stdout.split()), process.stderr) == (3, ended.split(), "")
