"""Tokens per second of the loader alone, beside a raw memmap and litdata's own loader, on the same dataset in one run.

    python benchmarks/stream.py                              # makes a dataset of random tokens
    python benchmarks/stream.py --dataset_path DATA/train    # or takes a merged one

Every contender delivers shuffled micro batches of int64 tensors of block_size + 1 tokens, from the page cache. The raw
loader is what a training script does without any library: random blocks of a numpy memmap, converted and stacked; "by
hand" copies each block once, into its place in the batch, and is about as fast as the memory allows. Contenders take
turns, so that a busy machine slows all of them; the figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("LITDATA_POSIX_FAST", "0")

import torch

from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index
from pretrainkit.stream import BlockLoader, BlockSource, open_sources

# Seconds of each measurement, after as long a warm-up.
_MEASURE_S = 2.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, help="folder with an index.json; default: made and deleted")
    parser.add_argument("--block_size", type=int, default=2048, help="context length")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="blocks per batch")
    parser.add_argument("--num_workers", type=int, default=1, help="loader threads (ours), loader processes (litdata)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dataset_path or _make_dataset(Path(temporary) / "data", tokens=200_000_000)
        flat = _flat_memmap(Path(temporary) / "flat.bin", BlockSource(folder, arguments.block_size))
        contenders = _contenders(folder, flat, arguments)
        tokens = arguments.micro_batch_size * arguments.block_size
        results: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, batches in contenders.items():
                results[name].append(_rate(batches(), tokens))
        _print_table(results, arguments)


def _contenders(
    folder: Path, tokens: np.ndarray, arguments: argparse.Namespace
) -> dict[str, Callable[[], Iterator[object]]]:
    """Name -> a function that begins an endless iterator of micro batches."""
    block_size, micro_batch, workers = arguments.block_size, arguments.micro_batch_size, arguments.num_workers

    def raw() -> Iterator[torch.Tensor]:
        generator = np.random.default_rng(0)
        while True:
            starts = generator.integers(0, len(tokens) - block_size, micro_batch)
            blocks = [torch.from_numpy(tokens[start : start + block_size + 1].astype(np.int64)) for start in starts]
            yield torch.stack(blocks)

    def tight() -> Iterator[torch.Tensor]:
        generator = np.random.default_rng(0)
        plain = np.asarray(tokens)
        while True:
            batch = torch.empty((micro_batch, block_size + 1), dtype=torch.int64)
            rows = batch.numpy()
            starts = generator.integers(0, len(plain) - block_size, micro_batch)
            for row, start in enumerate(starts.tolist()):
                rows[row] = plain[start : start + block_size + 1]
            yield batch

    def ours(num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
        loader = BlockLoader(
            open_sources({str(folder): 1.0}, "train", block_size),
            micro_batch_size=micro_batch,
            global_batch_size=micro_batch,
            num_workers=num_workers,
        )
        try:
            yield from loader
        finally:
            loader.close()

    def litdata(num_workers: int) -> Iterator[torch.Tensor]:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming.item_loader import TokensLoader

        dataset = StreamingDataset(
            str(folder), item_loader=TokensLoader(block_size=block_size + 1), shuffle=True, drop_last=True
        )
        while True:
            yield from StreamingDataLoader(dataset, batch_size=micro_batch, num_workers=num_workers, drop_last=True)

    return {
        "raw numpy memmap": raw,
        "raw numpy memmap, by hand": tight,
        "pretrainkit, no thread": lambda: ours(0),
        f"pretrainkit, {workers} thread": lambda: ours(workers),
        "litdata StreamingDataLoader, no worker": lambda: litdata(0),
        f"litdata StreamingDataLoader, {workers} worker": lambda: litdata(workers),
    }


def _flat_memmap(path: Path, source: BlockSource) -> np.memmap:
    """The same tokens in one flat file, as a training script without a library would keep them."""
    with path.open("wb") as file:
        for start in range(0, source.num_blocks, 4096):
            np.concatenate(source.views(np.arange(start, min(start + 4096, source.num_blocks)))).tofile(file)
    return np.memmap(path, dtype=source.dtype, mode="r")


def _make_dataset(folder: Path, tokens: int) -> Path:
    """Random GPT-2-like ids in chunks of 64 MB, documents of about 500 tokens."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    entries = []
    per_chunk = 32_000_000
    for index, start in enumerate(range(0, tokens, per_chunk)):
        count = min(per_chunk, tokens - start)
        path = folder / f"chunk-0-{index}.bin"
        ends = np.append(np.arange(500, count, 500), count)
        write_chunk(path, generator.integers(0, 50_257, count, dtype=np.uint16), ends)
        entries.append(ChunkEntry(path.name, path.stat().st_size, len(ends), count))
    write_index(folder, entries, "uint16", 64_000_000)
    return folder


def _rate(batches: Iterator[object], tokens_per_batch: int) -> float:
    """Tokens per second after a warm-up of the same length."""
    rate = 0.0
    for _ in range(2):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < _MEASURE_S:
            for _ in range(8):
                next(batches)
            count += 8
        rate = count * tokens_per_batch / (time.perf_counter() - start)
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return rate


def _print_table(results: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    base = statistics.median(results["raw numpy memmap"])
    sizes = f"block_size {arguments.block_size}, micro_batch_size {arguments.micro_batch_size}"
    print(f"{sizes}, medians of {arguments.rounds} turns")
    print(f"{'':<42}{'million tokens/s':>18}{'of raw':>10}")
    for name, rates in results.items():
        rate = statistics.median(rates)
        print(f"{name:<42}{rate / 1e6:>18.1f}{rate / base:>9.0%}")


if __name__ == "__main__":
    main()
