"""The ways of getting from Parquet to chunks that `optimize.py` compares, each in fresh processes, one per core.

Every process loads what it needs, waits for the others, and is then timed: start-up is left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
sys.path.insert(0, str(ROOT))


def shards(corpus: Path) -> list[Path]:
    """Every Parquet file, in order."""
    return sorted(corpus.rglob("*.parquet"))


def row_groups(corpus: Path, share: int, shares: int) -> Iterator[tuple[Path, int]]:
    """Every `shares`-th row group of the corpus, beginning with number `share`."""
    import pyarrow.parquet as pq

    numbered = [(path, group) for path in shards(corpus) for group in range(pq.ParquetFile(path).num_row_groups)]
    return iter(numbered[share::shares])


def read_batches(corpus: Path, column: str, share: int, shares: int) -> Iterator[Any]:
    """The text column of a share, as our reader reads it."""
    import pyarrow.parquet as pq

    for path, group in row_groups(corpus, share, shares):
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(8192, row_groups=[group], columns=[column], use_threads=False):
            yield batch.column(0)


def run_ours(options: argparse.Namespace, tokenizer: Path, share: int, shares: int, barrier: Any) -> tuple[float, int]:
    """(seconds, tokens) of our units."""
    from pretrainkit.plan import Plan
    from pretrainkit.tokenizers.folder import special_ids
    from pretrainkit.units.runner import UnitRunner, preload
    from pretrainkit.units.work import Job

    output_dir = Path(options.scratch) / "ours"
    plan = Plan.from_json((output_dir / "plan.json").read_text())
    job = Job(
        output_dir=str(output_dir),
        plan_id=plan.id,
        train_root=str(options.corpus),
        val_root=str(options.corpus),
        tokenizer_dir=str(tokenizer),
        special_ids=special_ids(tokenizer, plan.tokenizer),
    )
    runner = UnitRunner(job, f"node{share}", preload(job.tokenizer_dir, [plan.engine]))
    units = range(share, len(plan.units), shares)
    barrier.wait()
    start = CLOCKS[options.clock]()
    tokens = sum(result.tokens for result in runner.run_all(units))
    return CLOCKS[options.clock]() - start, tokens


def run_stock(options: argparse.Namespace, tokenizer: Path, share: int, shares: int, barrier: Any) -> tuple[float, int]:
    """(seconds, tokens) of the usual recipe, on this share of the sample."""
    import pyarrow.parquet as pq
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter
    from litgpt.tokenizer import Tokenizer

    torch.set_num_threads(1)
    encoder = Tokenizer(tokenizer)
    folder = Path(options.scratch) / f"stock{share}"
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="64MB", item_loader=TokensLoader())
    writer._rank = share
    barrier.wait()
    start = CLOCKS[options.clock]()
    tokens = documents = 0
    for path, group in row_groups(options.sample, share, shares):
        frame = pq.ParquetFile(path).read_row_group(group, columns=[options.text_column], use_threads=False).to_pandas()
        for text in frame[options.text_column]:
            ids = encoder.encode(text, eos=True).to(torch.int32)
            writer.add_item(documents, ids)
            tokens += len(ids)
            documents += 1
    writer.done()
    return CLOCKS[options.clock]() - start, tokens


def run_decode(
    options: argparse.Namespace, tokenizer: Path, share: int, shares: int, barrier: Any
) -> tuple[float, int]:
    """(seconds, tokens) of decoding the text and writing ids that are there already."""
    import numpy as np

    from pretrainkit.memory import keep_freed_memory
    from pretrainkit.tokenizers.gigatoken import GigatokenEngine

    keep_freed_memory()
    engine = GigatokenEngine(tokenizer)
    dtype = np.uint16 if max(engine._backend.vocab) < 65536 else np.int32
    encoded = [
        engine.encode(column).ids.astype(dtype)
        for column in read_batches(options.corpus, options.text_column, share, shares)
    ]
    barrier.wait()
    start = CLOCKS[options.clock]()
    with open(Path(options.scratch) / f"decode{share}.bin", "wb", buffering=0) as file:
        for _, ids in zip(read_batches(options.corpus, options.text_column, share, shares), encoded, strict=True):  # noqa: FURB122 - decoding goes on between the writes
            file.write(ids.data)
    return CLOCKS[options.clock]() - start, sum(map(len, encoded))


def run_engine(
    options: argparse.Namespace, tokenizer: Path, share: int, shares: int, barrier: Any
) -> tuple[float, int]:
    """(seconds, tokens) of the engine alone, its cache empty at first as in a real worker."""
    from pretrainkit.memory import keep_freed_memory
    from pretrainkit.tokenizers.gigatoken import GigatokenEngine

    keep_freed_memory()
    columns = list(read_batches(options.corpus, options.text_column, share, shares))
    engine = GigatokenEngine(tokenizer)
    barrier.wait()
    start = CLOCKS[options.clock]()
    tokens = sum(len(engine.encode(column).ids) for column in columns)
    return CLOCKS[options.clock]() - start, tokens


WAYS = {"ours": run_ours, "stock": run_stock, "decode": run_decode, "engine": run_engine}


def child(
    way: str, options: argparse.Namespace, tokenizer: Path, place: tuple[int, int], barrier: Any, results: Any
) -> None:
    """One process on one core."""
    share, shares = place
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[share % len(cores)]})
    try:
        results.put(WAYS[way](options, tokenizer, share, shares, barrier))
    except BaseException:
        barrier.abort()
        results.put(None)
        raise


def measure(way: str, options: argparse.Namespace, tokenizer: Path, cores: int) -> tuple[float, int]:
    """(seconds of the slowest process, tokens of all) of one run on `cores` cores."""
    shutil.rmtree(options.scratch, ignore_errors=True)
    Path(options.scratch).mkdir(parents=True)
    if way == "ours":
        write_plan(options, tokenizer)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.Queue()
    processes = [
        context.Process(target=child, args=(way, options, tokenizer, (share, cores), barrier, results))
        for share in range(cores)
    ]
    for process in processes:
        process.start()
    gathered = [results.get() for _ in processes]
    for process in processes:
        process.join()
    if None in gathered:
        sys.exit(f"{way} failed")
    return max(seconds for seconds, _ in gathered), sum(tokens for _, tokens in gathered)


def write_plan(options: argparse.Namespace, tokenizer: Path) -> None:
    """What `optimize_dataset` does before the first unit."""
    import dataclasses

    from pretrainkit.optimize.inputs import find_inputs
    from pretrainkit.plan import PlanSettings, make_plan
    from pretrainkit.tokenizers.folder import choose_boundary, choose_dtype, read_tokenizer

    info = read_tokenizer(tokenizer)
    settings = PlanSettings(text_column=options.text_column, boundary=choose_boundary(None, info))
    inputs = find_inputs(
        input_dir=str(options.corpus), val_dir=None, val_glob=None, hf_dataset=None, hf_config="", split=""
    )
    plan = make_plan(inputs.files, settings, info, choose_dtype(info), "fail")
    # settings.engine stays "auto": the share that is checked against the reference belongs to the price.
    plan = dataclasses.replace(plan, engine="gigatoken")
    (Path(options.scratch) / "ours").mkdir()
    (Path(options.scratch) / "ours/plan.json").write_text(plan.to_json())
