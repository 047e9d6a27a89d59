#!/usr/bin/env python3
"""Training speed: pretrainkit beside `litgpt pretrain`, on the same model, data, batch and precision, in one run.

Comes in: a model and batch sizes, or a preset. Goes out: a table with tokens per second after warm-up, the ratio to
litgpt, peak memory, MFU and the time from process start to the first finished step. Each row is a process of its own,
so that memory and start-up are its own; every technique can be switched off by naming its row in --rows.

    python benchmarks/pretrain.py                      # a size for this machine
    python benchmarks/pretrain.py --preset=h100        # three sizes, ours and litgpt, under 8 minutes on one H100
    python benchmarks/pretrain.py --preset=h100-160m --rows=all
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a bare clone


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size to train at."""

    model_name: str
    """litgpt's name."""
    changes: dict[str, Any]
    """litgpt Config keys that differ from the named model's."""
    block_size: int
    """Context."""
    micro_batch_size: int
    """Blocks per forward pass."""
    global_batch_size: int
    """Blocks per step."""
    steps: int
    """Steps in all."""
    warmup: int
    """Steps left out of the timing."""
    precision: str
    """litgpt's and ours."""


TOY = Case(
    model_name="pythia-14m", changes={"n_layer": 4}, block_size=128, micro_batch_size=4, global_batch_size=8, steps=12,
    warmup=4, precision="32-true",
)  # fmt: skip
H100 = Case(
    model_name="pythia-160m", changes={}, block_size=2048, micro_batch_size=16, global_batch_size=64, steps=24,
    warmup=8, precision="bf16-mixed",
)  # fmt: skip
PRESETS = {
    "cpu": [TOY],
    "h100-160m": [H100],
    "h100-1b": [
        replace(H100, model_name="tiny-llama-1.1b", micro_batch_size=8, global_batch_size=32, steps=14, warmup=5)
    ],
    "h100-8b": [
        replace(
            H100, model_name="Llama-3-8B", changes={"n_layer": 4}, micro_batch_size=4, global_batch_size=16, steps=16,
            warmup=6,
        )
    ],
}  # fmt: skip
PRESETS["h100"] = PRESETS["h100-160m"] + PRESETS["h100-1b"] + PRESETS["h100-8b"]

# What differs from the defaults, by row. "litgpt" compiles its whole model, as `litgpt pretrain` does.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "litgpt": {},
    "litgpt-eager": {},
    "ours": {},
    "ours-no-compile": {"compute": {"compile": False}},
    "ours-compile": {"compute": {"compile": True}},
    "ours-full-logits": {"loss": {"chunk_tokens": 1 << 30}},
    "ours-checkpoint-attention": {"compute": {"activation_checkpointing": "attention"}},
    "ours-checkpoint-mlp": {"compute": {"activation_checkpointing": "mlp"}},
    "ours-checkpoint-block": {"compute": {"activation_checkpointing": "block"}},
    "ours-document-mask": {"data": {"document_mask": True}},
    "ours-no-loader-threads": {"data": {"num_workers": 0}},
    "ours-log-rarely": {"train": {"log_interval": 4}},
    "ours-no-clipping": {"train": {"max_norm": None}},
    "ours-bf16-true": {"top": {"precision": "bf16-true"}},
    "ours-muon": {"optimizer": {"class_path": "Muon"}},
    "ours-float8": {"compute": {"float8": True}},
}


def write_dataset(folder: Path, case: Case, vocabulary: int) -> None:
    """Random tokens: enough for a run, with a boundary now and then."""
    import numpy as np

    from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index
    from pretrainkit.metadata import DatasetInfo, TokenizerInfo

    blocks = {"train": (case.steps + 2) * case.global_batch_size, "val": 4 * case.micro_batch_size}
    for split, count in blocks.items():
        target = folder / split
        target.mkdir(parents=True)
        num_tokens = count * (case.block_size + 1)
        dtype = np.uint16 if vocabulary < 1 << 16 else np.int32
        tokens = np.random.default_rng(0).integers(1, vocabulary, num_tokens).astype(dtype)
        ends = np.append(np.arange(700, num_tokens, 700), num_tokens)
        tokens[ends - 1] = 0
        write_chunk(target / "chunk-0-0.bin", tokens, ends)
        entry = ChunkEntry("chunk-0-0.bin", (target / "chunk-0-0.bin").stat().st_size, len(ends), num_tokens)
        write_index(target, [entry], np.dtype(dtype).name, 1 << 30)
        info = DatasetInfo(
            split=split, tokenizer=TokenizerInfo(name="none", sha256="0" * 64, vocab_size=vocabulary, eos_id=0),
            token_dtype=np.dtype(dtype).name, boundary="eos", documents=len(ends), tokens=num_tokens, chunks=1,
            max_token_id=vocabulary - 1,
        )  # fmt: skip
        (target / "metadata.json").write_text(info.to_json())


# --- one row, in a process of its own -------------------------------------------------------------------------------


def run_row(row: str, case: Case, data: Path, out: Path) -> None:
    """Train and write out/row.json: time stamps by step, memory, when the process began."""
    began = _process_start()
    stamps = (
        _litgpt(case, data, out, eager=row == "litgpt-eager")
        if row.startswith("litgpt")
        else _ours(row, case, data, out)
    )
    import torch

    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    (out / "row.json").write_text(json.dumps({"began": began, "stamps": stamps, "memory": memory}))


def _process_start() -> float:
    """When this process was started, on time.time()'s clock. Source: proc(5), field 22 of stat."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


def _litgpt(case: Case, data: Path, out: Path, *, eager: bool) -> list[tuple[int, float]]:
    """The real `litgpt pretrain`, watched at its own log calls, which follow its own host synchronisation."""
    import lightning
    import torch
    from litgpt import Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import LitData
    from litgpt.pretrain import setup

    sys.argv = [sys.argv[0], case.model_name]  # it parses the command line again when it saves its settings
    if eager:
        torch.compile = lambda model, **_: model  # type: ignore[assignment]
    stamps: list[tuple[int, float]] = []
    log_dict = lightning.Fabric.log_dict

    def watched(self: Any, metrics: dict[str, Any], step: int | None = None) -> None:
        if "iter_time" in metrics:
            stamps.append((metrics["step"], time.time()))
        log_dict(self, metrics, step)

    lightning.Fabric.log_dict = watched
    config = Config.from_name(case.model_name, **case.changes)
    tokens = case.steps * case.global_batch_size * case.block_size
    setup(
        model_name=case.model_name, model_config=config, out_dir=out / "run", precision=case.precision,
        data=LitData(data_path=data, split_names=("train", "val"), num_workers=1 if torch.cuda.is_available() else 0),
        train=TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=case.global_batch_size,
            micro_batch_size=case.micro_batch_size, max_tokens=tokens, max_norm=1.0, min_lr=4e-5, lr_warmup_steps=2,
            max_seq_length=case.block_size, tie_embeddings=False,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False), devices=1, logger_name="csv",
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9,
        0.95]}},
    )  # fmt: skip
    return stamps


def _ours(row: str, case: Case, data: Path, out: Path) -> list[tuple[int, float]]:
    from pretrainkit import config as c
    from pretrainkit.train import pretrain

    changes = ROWS[row]
    train = {
        "global_batch_size": case.global_batch_size, "micro_batch_size": case.micro_batch_size, "max_steps": case.steps,
        "max_seq_length": case.block_size, "lr_warmup_steps": 2, "save_interval": None,
    }  # fmt: skip
    pretrain(
        model_name=case.model_name, model_config=case.changes or None, dataset_path=str(data), out_dir=out / "run",
        precision=changes.get("top", {}).get("precision", case.precision), devices=1, launcher="local",
        train=c.TrainConfig(**train | changes.get("train", {})), data=c.DataConfig(**changes.get("data", {})),
        eval=c.EvalConfig(interval=None, final_validation=False), loss=c.LossConfig(**changes.get("loss", {})),
        optimizer=c.OptimizerConfig(**changes.get("optimizer", {})),
        compute=c.ComputeConfig(**changes.get("compute", {})),
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["time"]) for line in rows if line["event"] == "train"]


# --- the table ------------------------------------------------------------------------------------------------------


def measure(row: str, case: Case, data: Path, out: Path) -> dict[str, float] | None:
    """Run a row in a new process; its numbers, or None when it failed (its last line is printed)."""
    out.mkdir()
    command = [sys.executable, __file__, "--one", row, json.dumps(asdict(case)), str(data), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not (out / "row.json").is_file():
        print(f"{row}: failed: {(result.stderr.strip().splitlines() or ['no output'])[-1]}", flush=True)
        return None
    measured = json.loads((out / "row.json").read_text())
    last_of_step = dict(measured["stamps"])  # litgpt logs every micro batch; the last one of a step ends it
    steps = sorted(last_of_step)
    start = next(step for step in steps if step >= case.warmup)
    seconds = last_of_step[steps[-1]] - last_of_step[start]
    tokens = (steps[-1] - start) * case.global_batch_size * case.block_size
    return {
        "tokens_per_s": tokens / seconds,
        "memory": measured["memory"],
        "first_step_s": last_of_step[steps[0]] - measured["began"],
    }


def print_table(case: Case, rows: dict[str, dict[str, float]]) -> None:
    """The rows, the first litgpt row as the reference."""
    import torch

    from pretrainkit.models import flops_per_token, num_parameters, resolve_config
    from pretrainkit.train.metrics import peak_flops

    config = resolve_config(case.model_name, case.changes or None)
    flops, causal = flops_per_token(config, case.block_size)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_flops(device)
    print(
        f"\n{case.model_name} {case.changes or ''}: {num_parameters(config):,} parameters, {case.global_batch_size} x "
        f"{case.block_size} tokens per step, micro batch {case.micro_batch_size}, {case.precision}, {device}, torch "
        f"{torch.__version__}"
    )
    reference = next((values for name, values in rows.items() if name.startswith("litgpt")), None)
    print(f"{'':28}{'tokens/s':>12}{'ratio':>8}{'memory':>10}{'MFU':>7}{'causal':>8}{'first step':>12}{'ratio':>8}")
    for name, values in rows.items():
        rate = values["tokens_per_s"]
        speed = f"{rate / reference['tokens_per_s']:.2f}" if reference else ""
        start = f"{reference['first_step_s'] / values['first_step_s']:.2f}" if reference else ""
        mfu = f"{rate * flops / peak:.1%}" if peak else ""
        mfu_causal = f"{rate * causal / peak:.1%}" if peak else ""
        print(
            f"{name:28}{rate:12,.0f}{speed:>8}{values['memory'] / 1e9:8.2f}GB{mfu:>7}{mfu_causal:>8}"
            f"{values['first_step_s']:10.1f} s{start:>8}",
            flush=True,
        )


def main() -> None:
    """Run every case and row, and print the tables."""
    if sys.argv[1:2] == ["--one"]:
        row, case, data, out = sys.argv[2:]
        run_row(row, Case(**json.loads(case)), Path(data), Path(out))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rows", default=None, help="names separated by commas, or all; default litgpt and ours")
    parser.add_argument("--model_name", help="instead of the preset's")
    for name in ("block_size", "micro_batch_size", "global_batch_size", "steps", "warmup"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--precision", help="instead of the preset's")
    options = vars(parser.parse_args())
    preset, rows = options.pop("preset"), options.pop("rows")
    # On a CPU litgpt's whole-model compilation takes longer than the run: the reference there is litgpt without it.
    default = "litgpt-eager,ours" if preset == "cpu" else "litgpt,ours"
    names = list(ROWS) if rows == "all" else (rows or default).split(",")
    for name in names:
        if name not in ROWS:
            parser.error(f"no row {name!r}; there are {', '.join(ROWS)}")
    given = {name: value for name, value in options.items() if value is not None}
    for case in PRESETS[preset]:
        with tempfile.TemporaryDirectory() as folder:
            chosen = replace(case, **given)
            from pretrainkit.models import resolve_config

            config = resolve_config(chosen.model_name, chosen.changes or None)
            write_dataset(Path(folder) / "data", chosen, min(config.vocab_size, 32_000))
            results: dict[str, dict[str, float]] = {}
            for name in names:
                measured = measure(name, chosen, Path(folder) / "data", Path(folder) / name)
                if measured is not None:
                    results[name] = measured
            with contextlib.suppress(BrokenPipeError):
                print_table(chosen, results)


if __name__ == "__main__":
    main()
