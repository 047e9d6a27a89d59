#!/usr/bin/env python3
"""Training speed: pretrainkit beside `litgpt pretrain`, on the same model, data, batch and precision, in one run.

Comes in: a model and batch sizes, or a preset. Goes out: a table per model with tokens per second after warm-up, peak
memory, MFU, the time from process start to the end of the first step, and the ratios to litgpt; all of it, run by run,
in a JSON file that is whole after every run. Each row is the real command in a process of its own; rows take turns;
figures are medians over the turns. Every technique has a row that leaves it out or adds it: --rows=all.

On a CPU that others use too, compare the CPU seconds, measured with one thread: they hardly depend on what else runs.

    python benchmarks/pretrain.py                        # a size for this machine
    python benchmarks/pretrain.py --preset=h100          # three models, then what fits into 7.5 minutes on one H100
    python benchmarks/pretrain.py --preset=h100-160m --rows=all --budget_s=1500

A row that fails, runs out of memory or out of time is said so and loses nobody else's figures. One that runs out of
memory gets a second try with half the micro batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a bare clone

from pretrain_cases import PRESETS, ROWS, Case, Preset, Row  # noqa: E402 - beside this file

_PROGRAM = Path(__file__).with_name("pretrain_row.py")
# Of the budget, for the table and for processes that take their time to go.
_RESERVE_S = 10.0


class Clock:
    """The budget."""

    def __init__(self, budget_s: float | None) -> None:
        self._end = None if budget_s is None else time.monotonic() + budget_s - _RESERVE_S

    def left_s(self) -> float | None:
        """Seconds that a run may take; None without a budget."""
        return None if self._end is None else self._end - time.monotonic()


# --- data -----------------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, case: Case, vocabulary: int) -> None:
    """Random tokens: enough for a run and for litgpt's loader processes, with a boundary now and then."""
    import numpy as np

    from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index
    from pretrainkit.metadata import DatasetInfo, TokenizerInfo

    blocks = {"train": (case.steps + 2) * case.global_batch_size, "val": 4 * 8 * case.micro_batch_size}
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


# --- one run --------------------------------------------------------------------------------------------------------


def run_row(name: str, row: Row, case: Case, folder: Path, *, threads: int | None, timeout_s: float | None) -> dict:
    """One run in a process of its own; its figures, or why there are none.

    Args:
        name: For the folder.
        row: What to run.
        case: At what size.
        folder: With `data` and `model_config.json`; the run writes beside them.
        threads: OpenMP threads; None leaves it to PyTorch.
        timeout_s: The process is ended after this; what it has measured until then counts.
    """
    out = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    job = {
        "row": asdict(row), "case": asdict(case), "data": str(folder / "data"), "out": str(out),
        "model_config": json.loads((folder / "model_config.json").read_text()),
    }  # fmt: skip
    (out / "job.json").write_text(json.dumps(job))
    environment = _environment(threads) | {"TORCHINDUCTOR_CACHE_DIR": str(_compiler_cache(name, folder))}
    began = time.time()
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        # In a session of its own: its loader and compiler processes end with it.
        process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(out / "job.json")], stdout=log, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    result: dict[str, Any] = {"seconds": time.time() - began, **figures(case, out / "stamps.jsonl", began)}
    if code != 0:
        text = (out / "log.txt").read_text(encoding="utf-8", errors="replace")
        result |= {"error": why(code, text), "log": text[-4000:]}
    return result


def _environment(threads: int | None) -> dict[str, str]:
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "WANDB_MODE": "disabled", **own}


def _compiler_cache(name: str, folder: Path) -> Path:
    """A cold cache for the contenders, whose start is measured; ablations begin with what ours has compiled."""
    shared = folder / "cache-ours"
    if name.startswith("ours-") or (name == "ours" and not shared.exists()):
        return shared
    return Path(tempfile.mkdtemp(prefix="cache-", dir=folder))


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of a run's session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def why(code: int | None, log: str) -> str:
    """Why a run failed, in one line."""
    if code is None:
        return "out of time"
    if "out of memory" in log.lower() or "OutOfMemoryError" in log:
        return "out of memory"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (", perhaps for memory" if code == -signal.SIGKILL else "")
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"ended with {code}"


def figures(case: Case, path: Path, began: float) -> dict[str, float]:
    """What a run's stamps say; without any of it where they end too early."""
    lines = path.read_text().splitlines() if path.is_file() else []
    stamps = [json.loads(line) for line in lines]
    if not stamps:
        return {}
    result = {
        "first_step_s": stamps[0]["time"] - began, "first_step_cpu_s": stamps[0]["cpu"], "memory": stamps[-1]["memory"],
    }  # fmt: skip
    timed = [stamp for stamp in stamps if stamp["step"] >= case.warmup]
    if len(timed) < 2:
        return result
    first, last = timed[0], timed[-1]
    tokens = (last["step"] - first["step"]) * case.global_batch_size * case.block_size
    steps = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(timed)
    ]
    return result | {
        "tokens_per_s": tokens / (last["time"] - first["time"]),
        "tokens_per_cpu_s": tokens / (last["cpu"] - first["cpu"]),
        "median_step_s": statistics.median(steps),
        "slowest_step_s": max(steps),
        "timed_steps": last["step"] - first["step"],
    }


# --- all runs -------------------------------------------------------------------------------------------------------


class Results:
    """All figures so far, in memory and in a file."""

    def __init__(self, path: Path, probe: dict[str, Any], options: dict[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {"probe": probe, "options": options, "began": time.time(), "cases": []}

    def add_case(self, case: Case) -> None:
        """Begin a case."""
        self.data["cases"].append({"case": asdict(case), "rows": {}})

    def add(self, case: int, name: str, run: dict[str, Any]) -> None:
        """Add a run and rewrite the file."""
        self.data["cases"][case]["rows"].setdefault(name, []).append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".partial")
        draft.write_text(json.dumps(self.data, indent=1))
        draft.replace(self._path)


def schedule(preset: Preset, repeats: int) -> Iterator[tuple[int, str]]:
    """(case, row) in order of importance: every contender once, then again for the medians, then the ablations."""
    for turn in range(repeats):
        for case in range(len(preset.cases)):
            # Back and forth, so that a machine that slows down or warms up favours nobody.
            for name in preset.rows if turn % 2 == 0 else preset.rows[::-1]:
                yield case, name
    for name in preset.ablations:
        for case in range(len(preset.cases)):
            yield case, name


def run_all(preset: Preset, results: Results, folder: Path, *, repeats: int, threads: int | None, clock: Clock) -> None:
    """Every run of a preset that the budget allows."""
    longest: dict[tuple[int, bool], float] = {}  # by case and kind, for judging what still fits
    for number, name in schedule(preset, repeats):
        case, row = preset.cases[number], ROWS[name]
        left = clock.left_s()
        kind = (number, row.contender == "ours")
        if left is not None and left < longest.get(kind, 20.0):
            results.add(number, name, {"error": "not run: no time left"})
            continue
        run = run_row(name, row, case, folder / str(number), threads=threads, timeout_s=left)
        if run.get("error") == "out of memory" and case.micro_batch_size > 1:
            results.add(number, name, run)
            case = replace(case, micro_batch_size=case.micro_batch_size // 2)
            left = clock.left_s()
            if left is None or left > run["seconds"]:
                run = run_row(name, row, case, folder / str(number), threads=threads, timeout_s=left)
                run["micro_batch_size"] = case.micro_batch_size
        longest[kind] = max(longest.get(kind, 0.0), run["seconds"])
        results.add(number, name, run)
        rate = f"{run['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in run else ""
        print(f"{case.model_name}: {name}: {rate}{run.get('error', '')} ({run['seconds']:.0f} s)", flush=True)


def prepare(preset: Preset, folder: Path, threads: int | None) -> dict[str, Any]:
    """Write every case's data and model; the machine's facts."""
    from pretrainkit.models import resolve_config

    for number, case in enumerate(preset.cases):
        config = resolve_config(case.model_name, case.changes or None)
        write_dataset(folder / str(number) / "data", case, min(config.vocab_size, 32_000))
        (folder / str(number) / "model_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    job = {"row": {"contender": "probe"}, "case": asdict(preset.cases[0]), "out": str(folder)}
    (folder / "probe-job.json").write_text(json.dumps(job))
    # In a process of its own: this one must not hold memory of the device.
    subprocess.run(
        [sys.executable, str(_PROGRAM), str(folder / "probe-job.json")], check=True, env=_environment(threads)
    )
    probe: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return probe


# --- the table ------------------------------------------------------------------------------------------------------


def print_table(case: Case, rows: dict[str, list[dict[str, Any]]], probe: dict[str, Any]) -> None:
    """Medians over the turns; the first row that has figures is the reference."""
    from pretrainkit.models import flops_per_token, num_parameters, resolve_config
    from pretrainkit.train.metrics import peak_flops

    config = resolve_config(case.model_name, case.changes or None)
    flops, causal = flops_per_token(config, case.block_size)
    peak = peak_flops(probe["device"]) or probe["matmul_flops"]
    # On a CPU per CPU second, as the matrix products were measured: what else runs on it matters little then.
    rate = "tokens_per_s" if probe["on_gpu"] else "tokens_per_cpu_s"
    print(
        f"\n{case.model_name} {case.changes or ''}: {num_parameters(config):,} parameters, {case.global_batch_size} x "
        f"{case.block_size} tokens per step, micro batch {case.micro_batch_size}, {case.precision}, {probe['device']}, "
        f"torch {probe['torch']}\nMFU is of {peak / 1e12:,.3g} TFLOP/s; the largest matrix products reach "
        f"{probe['matmul_flops'] / 1e12:,.3g}"
    )
    columns = ["tokens_per_s", "first_step_s"] if probe["on_gpu"] else [
        "tokens_per_s", "tokens_per_cpu_s", "first_step_s", "first_step_cpu_s"
    ]  # fmt: skip
    heads = {"tokens_per_s": "tokens/s", "tokens_per_cpu_s": "per CPU s", "first_step_s": "first step",
             "first_step_cpu_s": "CPU s"}  # fmt: skip
    print(
        f"{'':27}"
        + "".join(f"{heads[name]:>11}{'ratio':>6}" for name in columns)
        + f"{'memory':>10}{'MFU':>7}{'causal':>8}"
    )
    medians = {name: _medians(runs) for name, runs in rows.items()}
    litgpt = (medians[name] for name in medians if name.startswith("litgpt"))
    reference = next((values for values in litgpt if "tokens_per_s" in values), {})
    for name, values in medians.items():
        line = f"{name:27}" + _line(values, reference, columns)
        line += f"{values['memory'] / 1e9:8.2f}GB" if "memory" in values else f"{'-':>10}"
        if rate in values:
            line += f"{values[rate] * flops / peak:7.1%}{values[rate] * causal / peak:8.1%}"
        print(line + _notes(rows[name]), flush=True)


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    keys = {key for run in runs for key, value in run.items() if isinstance(value, float | int)}
    return {key: statistics.median(run[key] for run in runs if key in run) for key in keys}


def _line(values: dict[str, float], reference: dict[str, float], columns: list[str]) -> str:
    line = ""
    for name in columns:
        if name not in values:
            line += f"{'-':>11}{'':6}"
            continue
        is_time = name.startswith("first")
        shown = f"{values[name]:.1f} s" if is_time else f"{values[name]:,.0f}"
        ratio = ""
        if name in reference:
            ratio = f"{(reference[name] / values[name] if is_time else values[name] / reference[name]):.2f}"
        line += f"{shown:>11}{ratio:>6}"
    return line


def _notes(runs: list[dict[str, Any]]) -> str:
    notes = [f"{len([run for run in runs if 'tokens_per_s' in run])} runs"] if len(runs) > 1 else []
    notes += dict.fromkeys(run["error"] for run in runs if "error" in run)
    notes += dict.fromkeys(f"micro batch {run['micro_batch_size']}" for run in runs if "micro_batch_size" in run)
    return "  " + "; ".join(notes) if notes else ""


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rows", help=f"names separated by commas, or all, instead of the preset's: {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each contender")
    parser.add_argument("--budget_s", type=float, help="seconds for everything; what does not fit is left out")
    parser.add_argument("--threads", type=int, help="CPU threads of each run")
    parser.add_argument("--json", type=Path, help="where all figures go; default build/bench/pretrain-PRESET.json")
    parser.add_argument("--model_name", help="instead of the preset's")
    for name in ("block_size", "micro_batch_size", "global_batch_size", "steps", "warmup"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--precision", help="instead of the preset's")
    options = parser.parse_args()
    preset = _chosen(parser, options)
    clock = Clock(preset.budget_s)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    path = options.json or Path("build/bench") / f"pretrain-{options.preset}.json"
    with tempfile.TemporaryDirectory(prefix="bench-pretrain-") as temporary:
        probe = prepare(preset, Path(temporary), options.threads)
        results = Results(path, probe, {name: str(value) for name, value in vars(options).items()})
        for case in preset.cases:
            results.add_case(case)
        try:
            run_all(
                preset, results, Path(temporary), repeats=options.repeats, threads=options.threads, clock=clock
            )  # fmt: skip
        except KeyboardInterrupt:
            print("stopped; what was measured:")
        for case, measured in zip(preset.cases, results.data["cases"], strict=True):
            print_table(case, measured["rows"], probe)
    print(f"\nevery run: {path}")


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Preset:
    """The preset with what the flags change."""
    preset = PRESETS[options.preset]
    given = {
        name: getattr(options, name) for name in (known.name for known in dataclasses.fields(Case))
        if getattr(options, name, None) is not None
    }  # fmt: skip
    if options.model_name is not None:
        given["changes"] = {}
    preset = replace(preset, cases=[replace(case, **given) for case in preset.cases])
    if options.rows is not None:
        names = tuple(ROWS) if options.rows == "all" else tuple(options.rows.split(","))
        for name in names:
            if name not in ROWS:
                parser.error(f"no row {name!r}; there are {', '.join(ROWS)}")
        preset = replace(preset, rows=names, ablations=())
    return preset if options.budget_s is None else replace(preset, budget_s=options.budget_s)


if __name__ == "__main__":
    main()
