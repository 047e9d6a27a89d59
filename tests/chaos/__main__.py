"""`python -m tests.chaos --cases N`: run N seeded cases, print what died and what the oracle found."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.chaos.cases import Chaos
from tests.chaos.processes import become_reaper, die_with_parent


def run_cases(seeds: Iterable[int], *, keep: bool) -> tuple[Counter[str], int]:
    """Run cases one after another; who was killed how often, and how many cases failed."""
    become_reaper()
    # Memory is a file system without waiting; a second one makes some merges cross a boundary that no link crosses.
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if os.access(memory, os.W_OK) else None))
    elsewhere = Path(tempfile.mkdtemp(prefix="chaos-"))
    kills: Counter[str] = Counter()
    failed = 0
    chaos = Chaos(home, elsewhere)
    for seed in seeds:
        report = chaos.run_case(seed)
        kills += report.kills
        failed += bool(report.problems)
        for problem in report.problems[:10]:
            print(f"seed {seed}: {problem}", flush=True)
    if keep:
        print(f"kept {home} and {elsewhere}", flush=True)
    else:
        shutil.rmtree(home)
        shutil.rmtree(elsewhere)
    return kills, failed


def fork_job(seeds: Iterable[int], *, keep: bool) -> int:
    """Run cases in a process of their own; a pipe to read the pickled result from."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        code = 1
        die_with_parent()
        try:
            result = run_cases(seeds, keep=keep)
            with open(writing, "wb") as pipe:
                pickle.dump(result, pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return reading


def main() -> int:
    """Exit code 0 when every case passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--cases", type=int, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--keep", action="store_true", help="keep the folders, to look at a case that failed")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begun = time.monotonic()
    seeds = range(arguments.seed, arguments.seed + arguments.cases)
    pipes = [fork_job(seeds[job :: arguments.jobs], keep=arguments.keep) for job in range(arguments.jobs)]
    kills: Counter[str] = Counter()
    failed = 0
    for pipe in pipes:
        with open(pipe, "rb") as results:
            theirs, count = pickle.load(results)
        kills += theirs
        failed += count
    print(f"{arguments.cases} cases, {failed} failed, {time.monotonic() - begun:.0f} s")
    print("killed: " + ", ".join(f"{count} x {what}" for what, count in sorted(kills.items())))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
