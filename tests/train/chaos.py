#!/usr/bin/env python3
"""Kill training at random moments, again and again, on changing numbers of ranks, and compare what comes out.

Comes in: a seed and a number of kills. Goes out: exit code 0 when every disturbed run ended like the undisturbed one.
The oracle: the same digest of all tokens and the same loss, line by line; with one rank throughout the same bits in
every weight and loss, else within fp32 tolerance; no save left half done; every checkpoint that says it is whole
verifies. Saves come between the log lines, which are of several steps.

Libraries are imported once; every process of a run is a fork. Kill times are drawn from the seed, from the start of a
process to some time after its end, so that starts, steps, saves and the last moments are all hit. A share of the
attempts gets SIGTERM instead, and must end with its code; after some, a bit of the newest checkpoint is flipped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrainkit.config import (  # noqa: E402 - found through the line above
    CheckpointConfig,
    ComputeConfig,
    EvalConfig,
    OptimizerArgs,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)
from tests.train.conftest import TINY_MODEL, write_split  # noqa: E402

STEPS = 40
SAVE_EVERY, LOG_EVERY = 4, 3
TERM_SHARE, DAMAGE_SHARE = 0.2, 0.15
END_OF_RUN_S = 600  # far beyond what a run needs: only a hang lasts that long


def configure(data: Path, out_dir: Path) -> PretrainConfig:
    """A run of STEPS short steps that saves often."""
    return PretrainConfig(
        model_config=TINY_MODEL,
        dataset_path=str(data),
        out_dir=out_dir,
        resume="auto",
        train=TrainConfig(
            global_batch_size=8,
            micro_batch_size=2,
            max_steps=STEPS,
            save_interval=SAVE_EVERY,
            lr_warmup_steps=2,
            log_interval=LOG_EVERY,
        ),
        eval=EvalConfig(interval=10, max_iters=2),
        optimizer=OptimizerConfig(init_args=OptimizerArgs(lr=1e-2)),
        checkpoint=CheckpointConfig(keep_last=2),
        compute=ComputeConfig(hang_timeout_s=None),
    )


def start(config: PretrainConfig, world_size: int, log: Path) -> dict[int, int | None]:
    """Fork the processes of one attempt: process id -> exit code, None while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: dict[int, int | None] = {}
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _be_rank(config, rank, world_size, port, log)
        children[child] = None
    return children


def _be_rank(config: PretrainConfig, rank: int, world_size: int, port: int, log: Path) -> None:
    """In a forked child: train, then exit without the parent's clean-up."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        import logging

        import torch

        from pretrainkit.errors import PretrainKitError
        from pretrainkit.train.setup import train_process

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        torch.set_num_threads(1)
        try:
            train_process(config, time.monotonic())
            code = 0
        except PretrainKitError as error:
            sys.stderr.write(f"error: {error}\n")
            code = error.exit_code
    except BaseException:  # noqa: BLE001 - a traceback belongs in the log, and must not run the parent's code
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(children: dict[int, int | None], seconds: float) -> list[int] | None:
    """Exit codes (negative: the signal) of all children, or None when one still runs after that time."""
    until = time.monotonic() + seconds
    while True:
        for child in _running(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children[child] = os.waitstatus_to_exitcode(status)
        if not _running(children):
            return [code for code in children.values() if code is not None]
        if time.monotonic() > until:
            return None
        time.sleep(0.01)


def stop(children: dict[int, int | None], number: int) -> None:
    """Send a signal to those that still run."""
    for child in _running(children):
        os.kill(child, number)


def _running(children: dict[int, int | None]) -> list[int]:
    return [child for child, code in children.items() if code is None]


def digests(run: Path) -> dict[int, str]:
    """Step -> digest of all tokens so far, in every row ever logged; a step logged twice must agree."""
    found: dict[int, str] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["event"] == "train":
            assert found.setdefault(row["step"], row["digest"]) == row["digest"], f"step {row['step']}: other data"
    return found


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of its line, as it was logged last."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["event"] == "train"}


def damage(run: Path, generator: random.Random) -> None:
    """Flip a bit in one of the newest checkpoint's files."""
    from pretrainkit.train.run_folder import complete_checkpoints

    for folder in complete_checkpoints(run)[:1]:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        path = generator.choice(files)
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)


def weights(final: Path) -> dict:
    """The model in a checkpoint."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(final / "lit_model.pth", Path(folder) / "whole.pt")
        return torch.load(Path(folder) / "whole.pt", weights_only=True)["model"]


def compare(reference: Path, run: Path, exact: bool) -> None:
    """Raise AssertionError where a disturbed run ended differently."""
    import torch

    from pretrainkit.train.run_folder import complete_checkpoints, verify_checkpoint

    ours, theirs = digests(run), digests(reference)
    assert ours == {step: theirs[step] for step in ours}
    assert STEPS in ours
    expected = losses(reference)
    for step, loss in losses(run).items():
        assert abs(loss - expected[step]) <= (0.0 if exact else 1e-3 * expected[step]), f"step {step}: another loss"
    assert list(run.glob("*.partial")) == [], "a save was left half done"
    for folder in complete_checkpoints(run):
        verify_checkpoint(folder)
    mine, undisturbed = weights(run / "final"), weights(reference / "final")
    for name, tensor in undisturbed.items():
        if exact:
            assert torch.equal(mine[name], tensor), f"{name} differs"
        else:
            torch.testing.assert_close(mine[name], tensor, rtol=2e-3, atol=2e-4, msg=f"{name} differs")


def disturb(
    config: PretrainConfig, generator: random.Random, worlds: list[int], whole_s: float, budget: int, log: Path
) -> int:
    """Start and kill one run until it ends by itself; the number of kills."""
    kills = 0
    while True:
        world_size = generator.choice(worlds)
        children = start(config, world_size, log)
        # Half of the kills early and anywhere, so that later ones still find work to disturb.
        after = generator.uniform(0, whole_s * (1.15 if world_size == 1 else 2.0)) if kills < budget else END_OF_RUN_S
        codes = wait_for(children, after)
        if codes is None and after == END_OF_RUN_S:
            stop(children, signal.SIGKILL)
            wait_for(children, END_OF_RUN_S)
            raise AssertionError(f"hangs; see {log}")
        if codes is not None:
            assert set(codes) == {0}, f"exit codes {codes}; see {log}"
            return kills
        kills += 1
        number = signal.SIGTERM if generator.random() < TERM_SHARE else signal.SIGKILL
        stop(children, number)
        codes = wait_for(children, END_OF_RUN_S)
        if codes is None:
            stop(children, signal.SIGKILL)
            raise AssertionError(f"did not end on signal {number}; see {log}")
        # A process may have finished, or not have begun to listen, when SIGTERM came.
        assert set(codes) <= {-number, 0, 143 if number == signal.SIGTERM else -number}, f"{codes}; see {log}"
        if generator.random() < DAMAGE_SHARE:
            damage(config.out_dir, generator)


def main() -> None:
    """Run the cases and print a line about each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills_per_run", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the folder of a failed case")
    options = parser.parse_args()

    import lightning  # noqa: F401 - imported once, for every fork
    import torch.distributed.checkpoint  # noqa: F401

    import pretrainkit.train.setup  # noqa: F401

    work = Path(tempfile.mkdtemp(prefix="training-chaos-"))
    if Path("/dev/shm").is_dir():  # a rename from there to the run's folder would fail
        tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="training-chaos-", dir="/dev/shm")
    for split, tokens, seed in (("train", 20_000, 1), ("val", 2_000, 2)):
        write_split(work / "data" / split, split, tokens, seed)
    reference = work / "reference"
    began = time.monotonic()
    assert wait_for(start(configure(work / "data", reference), 1, work / "reference.log"), END_OF_RUN_S) == [0]
    whole_s = time.monotonic() - began
    generator = random.Random(options.seed)
    kills = runs = 0
    while kills < options.cases:
        run = work / f"run-{runs}"
        worlds = generator.choice([[1], [2], [1, 2, 4]])
        budget = min(options.kills_per_run, options.cases - kills)
        kills += disturb(configure(work / "data", run), generator, worlds, whole_s, budget, work / f"run-{runs}.log")
        compare(reference, run, exact=worlds == [1])
        runs += 1
        print(f"run {runs}: ranks {worlds}, {kills} kills so far: as undisturbed", flush=True)
        shutil.rmtree(run)
    print(f"{kills} kills in {runs} runs, {time.monotonic() - began:.0f} s: every run ended as the undisturbed one")
    shutil.rmtree(work)
    shutil.rmtree(tempfile.gettempdir()) if tempfile.gettempdir().startswith("/dev/shm/training-chaos-") else None


if __name__ == "__main__":
    main()
