"""The parts of training one by one: guard, optimizers, manifest, metrics, loggers, signals, watchdog."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pretrainkit.config import CheckpointConfig, GuardConfig, OptimizerArgs, OptimizerConfig, PretrainConfig
from pretrainkit.errors import CheckpointError, StorageError
from pretrainkit.train.checkpoint import CheckpointWriter
from pretrainkit.train.dcp import read_tensors
from pretrainkit.train.guard import Guard
from pretrainkit.train.loggers import open_logger
from pretrainkit.train.manifest import MANIFEST_FILENAME, hash_files, read_manifest, verify_files, write_manifest
from pretrainkit.train.metrics import METRICS_FILENAME, MetricsWriter, peak_flops, train_line
from pretrainkit.train.optimizer import Muon, build_optimizer, gradient_norm, take_step
from pretrainkit.train.run_folder import complete_checkpoints, sweep_unfinished, verify_checkpoint
from pretrainkit.train.signals import Ballot, SignalWatch
from pretrainkit.train.state import TrainState, changes, read_record

ROOT = Path(__file__).resolve().parents[2]


# --- guard ----------------------------------------------------------------------------------------------------------


def test_the_guard_skips_what_is_not_finite_and_spikes_but_not_early_ones():
    guard = Guard(GuardConfig(spike_factor=3.0, warmup_steps=2, max_skips=1, window=10), torch.device("cpu"))
    norms = [50.0, 1.0, 1.0, 4000.0, float("nan"), float("inf"), 1.0]
    assert [guard.judge(torch.tensor(norm), step).item() for step, norm in enumerate(norms)] == [0, 0, 0, 1, 1, 1, 0]
    assert guard.recent_skips() == 3
    assert guard.num_taken.item() == 4


def test_the_guard_forgets_old_verdicts_and_survives_a_save():
    config = GuardConfig(max_skips=1, window=3)
    guard = Guard(config, torch.device("cpu"))
    for step, norm in enumerate([float("nan"), 1.0, float("nan"), 2.0]):
        guard.judge(torch.tensor(norm), step)
    assert guard.recent_skips() == 1  # the first verdict's place was taken by the fourth
    again = Guard(config, torch.device("cpu"))
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.state_dict() == guard.state_dict()


# --- optimizers -----------------------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = torch.nn.ModuleDict(
            {"wte": torch.nn.Embedding(8, 4), "h": torch.nn.ModuleList([torch.nn.Linear(4, 6)])}
        )
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 8, bias=False)


def names_of(model: torch.nn.Module, group: dict) -> set[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


def test_weight_decay_touches_matrices_alone():
    model = Tiny()
    (adamw,) = build_optimizer(model, OptimizerConfig(init_args=OptimizerArgs(weight_decay=0.3)))
    decayed, others = adamw.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert names_of(model, decayed) == {"transformer.h.0.weight", "lm_head.weight"}
    assert names_of(model, others) == {"transformer.wte.weight", "transformer.h.0.bias", "norm.weight", "norm.bias"}
    assert adamw.defaults["fused"]


def test_muon_takes_the_blocks_matrices():
    model = Tiny()
    adamw, muon = build_optimizer(model, OptimizerConfig(class_path="Muon"))
    assert names_of(model, muon.param_groups[0]) == {"transformer.h.0.weight"}
    assert sum(len(group["params"]) for group in adamw.param_groups) == 5


def fill_gradients(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_a_step_on_the_device_equals_clip_then_step():
    torch.manual_seed(0)
    model, plain = Tiny(), Tiny()
    plain.load_state_dict(model.state_dict())
    optimizers = build_optimizer(model, OptimizerConfig(init_args=OptimizerArgs(weight_decay=0.0)))
    reference = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        fill_gradients(model, step)
        fill_gradients(plain, step)
        norm = gradient_norm(optimizers)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert norm.item() == pytest.approx(expected.item())
        scale = 1 / (1.0 / (norm + 1e-6)).clamp(max=1.0)
        take_step(optimizers, learning_rate=0.01, grad_scale=scale, skip=torch.zeros(()))
        reference.param_groups[0]["lr"] = 0.01
        reference.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_skipped_step_changes_nothing_even_with_nan(name):
    torch.manual_seed(0)
    model = Tiny()
    optimizers = build_optimizer(model, OptimizerConfig(class_path=name))
    fill_gradients(model, 1)
    take_step(optimizers, learning_rate=0.01, grad_scale=torch.ones(()), skip=torch.zeros(()))
    before = [parameter.clone() for parameter in model.parameters()]
    states = [{k: v.clone() for k, v in s.items()} for optimizer in optimizers for s in optimizer.state.values()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    take_step(optimizers, learning_rate=0.01, grad_scale=torch.tensor(float("nan")), skip=torch.ones(()))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    after = [s for optimizer in optimizers for s in optimizer.state.values()]
    assert all(torch.equal(old[k], new[k]) for old, new in zip(states, after, strict=True) for k in old)


def test_muons_update_is_orthogonal_and_has_adamws_size():
    parameter = torch.nn.Parameter(torch.zeros(16, 32))
    parameter.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    muon = Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.9)
    take_step([muon], learning_rate=1.0, grad_scale=torch.ones(()), skip=torch.zeros(()))
    update = parameter.detach()
    singular = torch.linalg.svdvals(update) / (0.2 * 32**0.5)
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


# --- manifest -------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, step: int = 7) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.json").write_text("content")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(64)))
    write_manifest(folder, step, hash_files(folder, ["a.json", "sub/b.bin"]))
    return folder


def test_every_flipped_bit_is_found_in_every_file(tmp_path):
    folder = make_folder(tmp_path / "step-00000007")
    verify_checkpoint(folder)
    for path in (folder / "a.json", folder / "sub" / "b.bin", folder / MANIFEST_FILENAME):
        whole = path.read_bytes()
        for place in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify_checkpoint(folder)
        path.write_bytes(whole)
    verify_checkpoint(folder)


def test_missing_and_shorter_files_are_named(tmp_path):
    folder = make_folder(tmp_path / "step-00000007")
    (folder / "a.json").write_text("conten")
    (folder / "sub" / "b.bin").unlink()
    step, files = read_manifest(folder)
    assert step == 7
    assert verify_files(folder, files) == ["a.json has 6 bytes instead of 7", "sub/b.bin is missing"]
    # Ranks share the work, and together see everything.
    assert verify_files(folder, files, 0, 2) + verify_files(folder, files, 1, 2) == verify_files(folder, files)


def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path):
    folder = make_folder(tmp_path / "step-00000007")
    outside = hash_files(folder, ["a.json"])
    write_manifest(folder, 7, {"../a.json": outside["a.json"]})
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(folder)


def test_unfinished_saves_are_no_checkpoints_and_are_swept(tmp_path):
    make_folder(tmp_path / "step-00000007")
    make_folder(tmp_path / "step-00000009", step=9)
    make_folder(tmp_path / "step-00000011.partial", step=11)
    (tmp_path / "step-00000013").mkdir()
    (tmp_path / "step-mine.partial").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000009", "step-00000007"]
    sweep_unfinished(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000007", "step-00000009", "step-00000013", "step-mine.partial"]


def test_a_checkpoint_runs_no_code(tmp_path, caplog):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="wants to load posix.mkdir, which no checkpoint needs"):
        read_tensors({}, tmp_path, None)
    assert not (tmp_path / "ran").exists()
    assert not caplog.records, "PyTorch logs a traceback"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")])
def test_a_disk_that_fills_up_under_the_tensors_is_one_line(tmp_path, monkeypatch, error):
    from torch.distributed.checkpoint.api import CheckpointException

    def full(*_):
        raise CheckpointException("write", {0: (error, None)})

    monkeypatch.setattr("pretrainkit.train.dcp.write_tensors", full)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(), lambda _: None, None, 0)
    with pytest.raises(StorageError, match="cannot write .*: the disk is full; free space"):
        writer._write_tensors({}, tmp_path / "step-00000001.partial")


# --- metrics and loggers --------------------------------------------------------------------------------------------


def run_config(out_dir: Path, **changes) -> PretrainConfig:
    return PretrainConfig(**{"model_name": "pythia-14m", "dataset_path": "d", "out_dir": out_dir} | changes)


def test_metrics_are_whole_lines_even_after_a_kill(tmp_path):
    (tmp_path / METRICS_FILENAME).write_text('{"event": "train", "step": 1}\n{"event": "tra')
    writer = MetricsWriter(run_config(tmp_path), {}, TrainState(), rank=0)
    writer.write("train", TrainState(step=2, tokens=9), loss=float("nan"), mfu=None)
    writer.close()
    first, second = (json.loads(line) for line in (tmp_path / METRICS_FILENAME).read_text().splitlines())
    assert first == {"event": "train", "step": 1}
    assert {key: second[key] for key in ("event", "step", "tokens", "loss")} == {
        "event": "train", "step": 2, "tokens": 9, "loss": "nan",
    }  # fmt: skip
    assert "mfu" not in second


def test_metrics_on_a_full_disk_are_missed_and_nothing_else(tmp_path, caplog):
    (tmp_path / METRICS_FILENAME).symlink_to("/dev/full")
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    writer = MetricsWriter(run_config(tmp_path, logger_name="csv"), {}, TrainState(), rank=0)
    writer.write("train", TrainState(), loss=1.0)
    writer.close()
    assert "metrics.jsonl cannot be written (No space left on device); training goes on" in caplog.text
    assert "metrics cannot be logged (No space left on device); training goes on" in caplog.text


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(run_config(tmp_path / "run"), {}, TrainState(), rank=1)
    writer.write("train", TrainState(), loss=1.0)
    writer.close()
    assert not (tmp_path / "run").exists()


def test_one_line_per_logged_step():
    row = {"step": 1200, "tokens": 2_500_000_000, "loss": 3.21456, "learning_rate": 3e-4, "grad_norm": 0.815,
           "tokens_per_s": 1_234_567, "tokens_per_s_per_device": 154_320, "mfu": 0.412, "mfu_causal": 0.38,
           "memory_gb": 61.24, "data_wait": 0.0012, "remaining_s": 3723.4}  # fmt: skip
    assert train_line(row, 9000) == (
        "step 1,200/9,000 | 2.50B tokens | loss 3.2146 | lr 3.00e-04 | norm 0.81 | 1.23M tok/s (154.3k each) | "
        "mfu 41.2% (38.0% causal) | mem 61.2 GB | data 0.1% | 1:02:03 left"
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("x", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_known_devices_have_a_peak(name, peak):
    assert peak_flops(name) == peak


def test_wandb_without_a_key_goes_offline_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    started = {}

    class Run:
        def log(self, numbers, step):
            raise OSError("gone")

        def finish(self):
            raise AssertionError("must not be called after a failure")

    monkeypatch.setattr("wandb.init", lambda **options: started.update(options) or Run())
    state = TrainState()
    opened = open_logger(run_config(tmp_path, logger_name="wandb"), {}, state)
    assert started["mode"] == "offline"
    assert started["id"] == state.wandb_id
    opened.log({"loss": 1.0}, 1)
    opened.log({"loss": 1.0}, 2)
    opened.close()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "wandb: no API key (set WANDB_API_KEY or run `wandb login`)",
        "wandb: gone",
    ]


def test_wandb_without_a_network_goes_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    modes = []
    monkeypatch.setattr("wandb.init", lambda **options: modes.append(options["mode"]))
    open_logger(run_config(tmp_path, logger_name="wandb"), {}, TrainState())
    assert modes == ["offline"]
    assert "127.0.0.1 cannot be reached" in caplog.text


def test_wandb_that_refuses_the_run_goes_offline(tmp_path, monkeypatch, caplog):
    import wandb

    def refuse(**options):
        modes.append(options["mode"])
        if options["mode"] != "offline":
            raise wandb.errors.CommError("returned error 401")

    modes = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("wandb.init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        open_logger(run_config(tmp_path, logger_name="wandb"), {}, TrainState())
    assert modes == [None, "offline"]
    assert "wandb: returned error 401; logging offline" in caplog.text


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as wandb's server does when a key is wrong."""

    def do_POST(self):
        self.send_response(401)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST  # noqa: N815 - http.server's name

    def log_message(self, *rest):
        pass


@pytest.mark.slow
def test_wandb_with_a_key_that_a_server_refuses_goes_on_offline(tmp_path, monkeypatch, caplog):
    """wandb itself, whose service holds the id of the run that failed."""
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state = TrainState()
    try:
        opened = open_logger(run_config(tmp_path, logger_name="wandb"), {}, state)
        opened.log({"loss": 1.0}, 1)
        opened.close()
    finally:
        wandb.teardown()
        server.shutdown()
        server.server_close()
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("pretrainkit")]
    assert "401" in line
    assert "logging offline into" in line
    assert list(tmp_path.rglob(f"run-{state.wandb_id}.wandb"))


def test_wandb_that_refuses_to_work_offline_too_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(**options):
        assert options["settings"].init_timeout == 20
        raise RuntimeError(f"no {options['mode']}")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("wandb.init", refuse)
    monkeypatch.setattr("wandb.teardown", lambda: None)
    opened = open_logger(run_config(tmp_path, logger_name="wandb"), {}, TrainState())
    opened.log({"loss": 1.0}, 1)
    opened.close()
    assert caplog.text.count("wandb: no offline") == 2
    assert "nothing is logged there, metrics.jsonl goes on" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_numbers(tmp_path):
    opened = open_logger(run_config(tmp_path, logger_name="tensorboard"), {"a": 1}, TrainState())
    opened.log({"loss": 1.0}, 1)
    opened.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guard": None}, "it lacks guard"),
        ({"rng": None, "config": None}, "it lacks config, rng"),
        ({"state": {"step": "three"}}, "step is 'three', not a number"),
        ({"state": {"unheard_of": 1}}, "unheard_of"),
    ],
)
def test_a_state_that_another_program_wrote_is_one_line(tmp_path, change, words):
    record = {
        "config": {},
        "guard": {},
        "rng": "",
        "world_size": 1,
        "state": {"cursor": None, "portions": [], "step": 3},
    }
    (tmp_path / "state.json").write_text(json.dumps(record))
    assert read_record(tmp_path)["state"].step == 3
    for key, value in change.items():
        if value is None:
            del record[key]
        else:
            record[key] |= value
    (tmp_path / "state.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"state.json cannot be read \(.*{words}.*\); take another checkpoint"):
        read_record(tmp_path)


def test_changes_name_what_can_change_the_result():
    before = {"seed": 1, "out_dir": "a", "train": {"max_steps": 1, "log_interval": 1}, "eval": {"interval": 1}}
    after = {"seed": 2, "out_dir": "b", "train": {"max_steps": 1, "log_interval": 5}, "eval": {"interval": 9}}
    assert changes(before, after) == ["seed: 1 -> 2"]


# --- signals and watchdog -------------------------------------------------------------------------------------------


def test_a_signal_is_remembered_and_a_second_interrupt_interrupts(monkeypatch):
    watch = SignalWatch()
    before = signal.getsignal(signal.SIGINT)
    with watch.watching():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl+C, passed on by who started us
        assert watch.received == signal.SIGINT
        later = time.monotonic() + 1.0
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_rank_votes_alone():
    ballot = Ballot(None)
    assert [ballot.cast(vote) for vote in (0, 15)] == [0, 15]


# Its arguments: the folder, its rank, the step it is in, how far in the step, how long it may be silent.
HANGING = """
import logging, sys, time
from pathlib import Path
from pretrainkit.train.watchdog import Watchdog
logging.basicConfig(format="%(message)s")
def stuck_in_the_data():
    time.sleep(60)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dog = Watchdog(folder, rank, float(sys.argv[5]))
(folder / f"here-{rank}").touch()
while len(list(folder.glob("here-*"))) < 2:
    time.sleep(0.01)
dog.start()
for _ in range(int(sys.argv[4])):
    dog.alive(int(sys.argv[3]), "waiting for data")
(folder / f"began-{rank}").touch()
stuck_in_the_data()
"""


def start_hanging(folder: Path, rank: int, step: int, signs: int, timeout_s: float) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    arguments = [str(folder), *map(str, (rank, step, signs, timeout_s))]
    return subprocess.Popen(
        [sys.executable, "-c", HANGING, *arguments],
        cwd=ROOT, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("places", [((8, 4), (7, 4)), ((7, 4), (7, 3))], ids=["step", "within a step"])
def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path, places):
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "rank-00002.json").write_text("{}")  # of an earlier process, on more ranks
    ranks = [start_hanging(tmp_path, rank, *place, timeout_s=1.0) for rank, place in enumerate(places)]
    outputs = [process.communicate(timeout=50)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75]
    assert all("rank 1 hangs: no progress for 1 s in step 7 while waiting for data" in output for output in outputs)
    assert "stuck_in_the_data" in outputs[1]
    assert "stuck_in_the_data" in (tmp_path / "watchdog" / "rank-00001.stack").read_text()


@pytest.mark.slow
def test_a_rank_that_lives_joins_one_that_gives_up_and_is_not_said_to_be_silent(tmp_path):
    ranks = [start_hanging(tmp_path, 0, 7, 4, timeout_s=1.0), start_hanging(tmp_path, 1, 8, 4, timeout_s=3.0)]
    outputs = [process.communicate(timeout=50)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75]
    assert "error: rank 0 hangs: no progress for 1 s in step 7 while waiting for data" in outputs[0]
    assert "error: rank 0 hangs" in outputs[1]
    assert json.loads((tmp_path / "watchdog" / "rank-00001.json").read_text())["silent_s"] < 3.0


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_not_the_one_that_waits_for_it(tmp_path):
    ranks = [start_hanging(tmp_path, 0, 7, 4, timeout_s=1.0), start_hanging(tmp_path, 1, 7, 4, timeout_s=1.0)]
    try:
        while not (tmp_path / "began-1").exists():
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGSTOP)
        output = ranks[0].communicate(timeout=50)[1]
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 75
    stack = tmp_path / "watchdog" / "rank-00000.stack"
    assert output == (
        "error: rank 1 gave no sign for 1 s; rank 0 waits for it in step 7 while waiting for data; its stack is in "
        f"{stack}; add --resume=auto\n"
    )
    assert "stuck_in_the_data" in stack.read_text()


def test_a_process_that_lives_is_left_alone(tmp_path):
    from pretrainkit.train.watchdog import Watchdog

    dog = Watchdog(tmp_path, 0, None)
    dog.start()
    dog.alive(1, "computing")
    dog.stop()
    assert list(tmp_path.iterdir()) == []
