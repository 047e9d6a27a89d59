"""`python -m tests.chaos --cases N`: run N seeded cases, print what died and what the oracle found."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.cases import Chaos
from tests.chaos.processes import become_reaper


def main() -> int:
    """Exit code 0 when every case passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--cases", type=int, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow")
    parser.add_argument("--keep", action="store_true", help="keep the folder, to look at a case that failed")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    become_reaper()
    # Memory is a file system without waiting; a second one makes some merges cross a boundary that no link crosses.
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if os.access(memory, os.W_OK) else None))
    elsewhere = Path(tempfile.mkdtemp(prefix="chaos-"))
    kills: Counter[str] = Counter()
    failed = 0
    begun = time.monotonic()
    chaos = Chaos(home, elsewhere)
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        report = chaos.run_case(seed)
        kills += report.kills
        failed += bool(report.problems)
        for problem in report.problems[:10]:
            print(f"seed {seed}: {problem}", flush=True)
        if (seed - arguments.seed) % 100 == 99:
            print(f"{seed - arguments.seed + 1} cases, {failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{arguments.cases} cases, {failed} failed, {time.monotonic() - begun:.0f} s")
    print("killed: " + ", ".join(f"{count} x {what}" for what, count in sorted(kills.items())))
    if arguments.keep:
        print(f"kept {home} and {elsewhere}")
    elif not failed:
        import shutil

        shutil.rmtree(home)
        shutil.rmtree(elsewhere)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
