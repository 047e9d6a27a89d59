#!/usr/bin/env python3
"""How fast optimize is, beside the stock recipe and beside what the hardware allows, in one run.

    python benchmarks/optimize.py --corpus DIR --tokenizer DIR [DIR ...]

Without arguments it makes a small corpus of the Python library's source and trains a small tokenizer on it. Every way
runs in fresh processes, one per core, that load what they need, wait for each other, and are then timed: start-up is
left out. The ways:

    ours      the work units of `optimize_dataset`, fsync and checksums included
    stock     pyarrow -> pandas -> litgpt's Tokenizer.encode per document -> litdata's BinaryWriter, on a sample
    decode    floor 1: decode the text column, write the ids' bytes
    engine    the tokenizer engine alone, on text in memory; floor 2 is decode + engine

The sample is every n-th document of the corpus, --sample_mb of text: the slow ways are steady, ours is measured on all.

    --whole             also the whole commands, start-up included, on all cores: `optimize_dataset.py` and
                        `litdata.optimize` with the stock recipe, on --whole_mb of the corpus
    --peers PYTHON ...  also datatrove and Megatron-LM's preprocess_data.py, each run by the Python of its own
                        environment (see benchmarks/peers/): by itself on the sample, and with gigatoken inside on
                        --whole_mb of the corpus
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from optimize_ways import CLOCKS, ROOT, WAYS, measure, read_batches, shards

STOCK_COMMAND = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
from litdata import optimize
from litdata.streaming.item_loader import TokensLoader
from litgpt.tokenizer import Tokenizer

def encode(path):
    torch.set_num_threads(1)
    tokenizer = Tokenizer(Path(sys.argv[2]))
    for text in pq.read_table(path, columns=[sys.argv[4]]).to_pandas()[sys.argv[4]]:
        yield tokenizer.encode(text, eos=True).to(torch.int32)

if __name__ == "__main__":
    inputs = sorted(str(path) for path in Path(sys.argv[1]).rglob("*.parquet"))
    optimize(fn=encode, inputs=inputs, output_dir=sys.argv[3], chunk_bytes="64MB", item_loader=TokensLoader(),
             num_workers=int(sys.argv[5]), start_method="spawn")
"""


def measure_whole(options: argparse.Namespace, tokenizer: Path, cores: int) -> tuple[float, float]:
    """Seconds of our whole command, and of the stock one, on the same files and cores."""
    seconds, corpus = [], options.whole_sample
    for stock in (False, True):
        shutil.rmtree(options.scratch, ignore_errors=True)
        Path(options.scratch).mkdir(parents=True)
        target = str(Path(options.scratch) / "out")
        ours = ["optimize_dataset.py", f"--input_dir={corpus}", f"--tokenizer_dir={tokenizer}",
                f"--output_dir={target}", f"--num_workers={cores}", f"--text_column={options.text_column}"]  # fmt: skip
        script = Path(options.scratch) / "stock.py"
        script.write_text(STOCK_COMMAND)
        arguments = [str(script), str(corpus), str(tokenizer), target, options.text_column, str(cores)]
        environment = {**os.environ, "DATA_OPTIMIZER_CACHE_FOLDER": f"{options.scratch}/cache",
                       "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{options.scratch}/data"}  # fmt: skip
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *(arguments if stock else ours)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env=environment,
        )
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def compare_whole(options: argparse.Namespace, tokenizer: Path, cores: int) -> dict[str, Any]:
    """Median seconds of both whole commands, printed in one line."""
    pairs = [measure_whole(options, tokenizer, cores) for _ in range(options.repeats)]
    ours, stock = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    print(f"{tokenizer.name:<12}  ours {ours:.1f} s  stock {stock:.1f} s  {stock / ours:.1f} times", flush=True)
    return {"tokenizer": tokenizer.name, "whole_ours_s": ours, "whole_stock_s": stock}


def write_sample(corpus: Path, column: str, folder: Path, wanted_mb: float, files: int) -> None:
    """Every n-th document of a corpus as a corpus of so many files, and as one JSON Lines file beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = pa.chunked_array([batch.cast(pa.large_string()) for batch in read_batches(corpus, column, 0, 1)])
    step = max(1, round(documents.nbytes / 1e6 / wanted_mb))
    chosen = documents.take(pa.array(range(step // 2, len(documents), step)))
    folder.mkdir()
    for number in range(files):
        part = chosen.take(pa.array(range(number, len(chosen), files)))
        pq.write_table(pa.table({column: part}), folder / f"sample-{number}.parquet", row_group_size=1000)
    with open(folder.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in chosen.to_pylist())


PEERS = {"datatrove": "datatrove_tokenize.py", "megatron": "megatron_preprocess.py"}
PEER_ENGINES = ("native", "gigatoken", "gigatoken-arrays")


def measure_peer(options: argparse.Namespace, tokenizer: Path, python: Path, engine: str, cores: int) -> float:
    """Tokens per second and core of one peer; see its script for what is left out."""
    peer = next(name for name in PEERS if name in python.parts)
    sample: Path = options.sample if engine == "native" else options.whole_sample
    source = sample.with_suffix(".jsonl") if peer == "megatron" else sample
    shutil.rmtree(options.scratch, ignore_errors=True)
    script = ROOT / "benchmarks/peers" / PEERS[peer]
    command = [str(python), str(script), str(source), str(tokenizer), options.scratch]
    command += [f"--workers={cores}", f"--engine={engine}"]
    if peer == "datatrove":
        command.append(f"--text_column={options.text_column}")
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{peer} failed: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    seconds = figures["seconds"] if options.clock == "wall" else figures["cpu_seconds"] / cores
    return float(figures["tokens"] / seconds / cores)


def compare_peers(options: argparse.Namespace, tokenizer: Path, cores: int) -> dict[str, Any]:
    """Median rates of ours, and of each peer with each engine, and the ratios."""
    rates: dict[str, list[float]] = {"ours": []}
    for _ in range(options.repeats):
        seconds, tokens = measure("ours", options, tokenizer, cores)
        rates["ours"].append(tokens / seconds / cores)
        for python in options.peers:
            for engine in PEER_ENGINES:
                name = f"{next(name for name in PEERS if name in python.parts)} {engine}"
                rates.setdefault(name, []).append(measure_peer(options, tokenizer, python, engine, cores))
    median = {name: statistics.median(values) for name, values in rates.items()}
    times = {name: median["ours"] / rate for name, rate in median.items()}
    return {"tokenizer": tokenizer.name, "cores": cores, "tokens_per_second_per_core": median, "times_peer": times}


def text_megabytes(corpus: Path, column: str) -> float:
    """Megabytes of text in the corpus."""
    return sum(batch.nbytes for batch in read_batches(corpus, column, 0, 1)) / 1e6


def make_small_corpus(folder: Path) -> tuple[Path, Path]:
    """A corpus and a tokenizer that every installation can make: the quickstart's."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import quickstart

    quickstart.CORPUS, quickstart.TOKENIZER = folder / "corpus", folder / "tokenizer"
    quickstart.write_corpus()
    quickstart.train_tokenizer()
    return quickstart.CORPUS, quickstart.TOKENIZER


def compare(options: argparse.Namespace, tokenizer: Path, cores: int, megabytes: float) -> dict[str, Any]:
    """Median rates of every way on `cores` cores, and their ratios."""
    rates: dict[str, list[float]] = {way: [] for way in options.ways}
    times: dict[str, list[float]] = {way: [] for way in options.ways}
    for _ in range(options.repeats):  # in turn, so that a busy moment hits all of them
        for way in options.ways:
            seconds, tokens = measure(way, options, tokenizer, cores)
            rates[way].append(tokens / seconds / cores)
            times[way].append(seconds)
    median = {way: statistics.median(values) for way, values in rates.items()}
    row: dict[str, Any] = {"tokenizer": tokenizer.name, "cores": cores, "tokens_per_second_per_core": median}
    if "ours" in median and "stock" in median:
        row["times_stock"] = median["ours"] / median["stock"]
    if {"ours", "decode", "engine"} <= set(times):
        seconds = {way: statistics.median(values) for way, values in times.items()}
        row["ours_mb_per_second_per_core"] = megabytes / seconds["ours"] / cores
        row["share_of_floor_1"] = seconds["decode"] / seconds["ours"]
        row["share_of_floor_2"] = (seconds["decode"] + seconds["engine"]) / seconds["ours"]
    return row


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    rates = row["tokens_per_second_per_core"]
    cells = [f"{row['tokenizer']:<12}", f"{row['cores']:>5}"]
    cells += [f"{rates[way] / 1e6:>9.3f}" if way in rates else f"{'':>9}" for way in WAYS]
    cells += [f"{row[key]:>{width}{form}}" if key in row else " " * width for key, width, form in COLUMNS]
    print("  ".join(cells), flush=True)


def show_peers(row: dict[str, Any]) -> None:
    """One line per way of each peer."""
    print(f"{row['tokenizer']}, {row['cores']} core{'' if row['cores'] == 1 else 's'}:")
    for name, rate in row["tokens_per_second_per_core"].items():
        print(f"    {name:<28} {rate / 1e6:>8.3f}  ours is {row['times_peer'][name]:.1f} times as fast", flush=True)


COLUMNS = (
    ("times_stock", 9, ".1f"),
    ("share_of_floor_2", 9, ".0%"),
    ("share_of_floor_1", 9, ".0%"),
    ("ours_mb_per_second_per_core", 9, ".1f"),
)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of Parquet files")
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=[], help="tokenizer folders")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample_mb", type=float, default=8.0, help="text the slow ways get")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a machine that others use too")
    parser.add_argument("--whole", action="store_true", help="also compare the whole commands")
    parser.add_argument("--whole_mb", type=float, default=100.0, help="text for the whole commands")
    parser.add_argument("--peers", type=Path, nargs="+", default=[], metavar="PYTHON",
                        help="PEERS/datatrove/bin/python PEERS/megatron/bin/python")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pretrainkit-benchmark-") as folder:
        if options.corpus is None:
            options.corpus, small = make_small_corpus(Path(folder))
            options.tokenizer = options.tokenizer or [small]
        options.corpus = options.corpus.resolve()
        options.scratch = str(Path(folder) / "scratch")
        options.sample = Path(folder) / "sample"
        megabytes = text_megabytes(options.corpus, options.text_column)
        options.whole_sample, parts = Path(folder) / "whole", 4 * max(options.cores)
        write_sample(options.corpus, options.text_column, options.sample, options.sample_mb, max(options.cores))
        write_sample(options.corpus, options.text_column, options.whole_sample, options.whole_mb, parts)
        machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
        text = f"{megabytes:.0f} MB of text in {len(shards(options.corpus))} files"
        print(f"{machine}; {text}; medians of {options.repeats}, {options.clock} time")
        print("million tokens per second per core; start-up left out")
        heads = [
            "tokenizer   ",
            "cores",
            *(f"{way:>9}" for way in WAYS),
            "  x stock",
            " /floor 2",
            " /floor 1",
            "MB/s/core",
        ]
        print("  ".join(heads))
        rows = []
        for tokenizer, cores in itertools.product(options.tokenizer, options.cores):
            rows.append(compare(options, tokenizer.resolve(), cores, megabytes))
            show(rows[-1])
        for tokenizer, cores in itertools.product(options.tokenizer if options.peers else [], options.cores):
            rows.append(compare_peers(options, tokenizer.resolve(), cores))
            show_peers(rows[-1])
        if options.whole:
            size = text_megabytes(options.whole_sample, options.text_column)
            print(
                f"whole commands, start-up included, {max(options.cores)} cores, {size:.0f} MB of text in {parts} files"
            )
            rows += [compare_whole(options, path.resolve(), max(options.cores)) for path in options.tokenizer]
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
