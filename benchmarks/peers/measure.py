"""What the peers' scripts share: arguments, one thread per process, the clock and the line of JSON at the end.

It runs inside a peer's environment, so it imports the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def parser_of(description: str | None, input_help: str) -> argparse.ArgumentParser:
    """The arguments that every peer takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help=input_help)
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("output", type=Path, help="new folder for the peer's files")
    parser.add_argument("--workers", type=int, default=1, help="worker processes, and cores that the whole may use")
    parser.add_argument("--engine", choices=["native", "gigatoken", "gigatoken-arrays"], default="native")
    parser.add_argument("--text_column", default="text")
    return parser


def confine(workers: int) -> None:
    """Bind this process and all it starts to `workers` cores, one thread each; call it before a peer is imported."""
    # RAYON: tokenizers and gigatoken. OMP: torch, and the size of Arrow's pool.
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        sys.exit(f"--workers={workers} is more than the {len(cores)} cores that this process may use")
    os.sched_setaffinity(0, cores[:workers])


def eos_token(tokenizer: Path) -> str:
    """The text of the token that ends a document."""
    token = json.loads((tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    return token if isinstance(token, str) else token["content"]


def new_folder(folder: Path) -> Path:
    """The folder, made now, so that nothing of an earlier run is counted."""
    if folder.exists():
        sys.exit(f"{folder} exists already; name a new folder")
    folder.mkdir(parents=True)
    return folder.resolve()


def report(run: Callable[[Path, Path], tuple[int, int]], one_document: Path, whole: Path, output: Path) -> None:
    """Run the peer on one document, then on the whole; print the whole's figures less the first run's.

    `run(input, output)` gives (tokens, documents). What is loaded late should have been loaded before, in this process;
    the run on one document is what remains of start-up: processes made, pools and files opened.
    """
    _, start_seconds, start_cpu = _timed(run, one_document, output / "one")
    (tokens, documents), seconds, cpu = _timed(run, whole, output / "whole")
    figures = {"seconds": seconds - start_seconds, "cpu_seconds": cpu - start_cpu, "tokens": tokens}
    print(json.dumps(figures | {"documents": documents}), flush=True)


def _timed(
    run: Callable[[Path, Path], tuple[int, int]], source: Path, output: Path
) -> tuple[tuple[int, int], float, float]:
    """(what the run gives, wall seconds, CPU seconds of this process and its descendants)."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    counts = run(source, output)
    return counts, time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """User and system time of this process and of every descendant that has ended and been waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
