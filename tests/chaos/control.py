"""The control: stock `litdata.optimize` under the same kills and the same oracle. A harness it passes would be broken.

Each case kills one of its two workers at a seeded document. What must happen, if the harness sees anything at all: the
job returns as if nothing had been, or cannot be run again to the same end, and documents are missing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.chaos.oracle import read_tokens
from tests.chaos.processes import become_reaper, reap_orphans, start, wait_or_kill

DOCUMENTS = 200
_MARKER = 511


class _Encode:
    """What a user gives to litdata: document number -> tokens; dies at one document."""

    def __init__(self, victim: int | None) -> None:
        self._victim = victim

    def __call__(self, number: int) -> Any:
        import torch

        if number == self._victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([number, number, _MARKER], dtype=torch.uint16)


def _optimize(output_dir: Path, victim: int | None) -> None:
    from litdata import optimize
    from litdata.streaming.item_loader import TokensLoader

    optimize(
        fn=_Encode(victim),
        inputs=list(range(DOCUMENTS)),
        output_dir=str(output_dir),
        num_workers=2,
        chunk_bytes=128,
        item_loader=TokensLoader(),
        start_method="fork",
        verbose=False,
    )


def visible_documents(folder: Path) -> int | None:
    """Documents in a finished dataset; None when it has no index, which says that it is not finished."""
    if not (folder / "index.json").exists():
        return None
    chunks = json.loads((folder / "index.json").read_text())["chunks"]
    return sum(read_tokens(folder / chunk["filename"]).count(_MARKER) for chunk in chunks)


def run_control(seed: int, home: Path) -> dict[str, Any]:
    """One case: exit code and documents after the kill, and after running the same command again."""
    victim = random.Random(seed).randrange(DOCUMENTS)
    output, log = home / f"control-{seed}", home / f"control-{seed}.log"
    scratch = home / f"scratch-{seed}"  # litdata empties its scratch folder whoever owns it
    environ = {"DATA_OPTIMIZER_CACHE_FOLDER": f"{scratch}/c", "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{scratch}/d"}
    outcome: dict[str, Any] = {"seed": seed, "victim": victim}
    for name, doomed in (("killed", victim), ("rerun", None)):
        pid = start(lambda d=doomed: _optimize(output, d), log, environ)
        (code,) = wait_or_kill([pid], 60.0, list)  # a hang is a failure too
        outcome[name] = {"exit_code": code, "documents": visible_documents(output), "left": len(reap_orphans(5.0))}
    return outcome


def lost_silently(outcome: dict[str, Any]) -> bool:
    """Whether the job said that all is well, with documents missing."""
    killed = outcome["killed"]
    return killed["exit_code"] == 0 and killed["documents"] != DOCUMENTS


def main() -> int:
    """Run three cases, one line each; exit code 0 when the harness caught stock litdata losing documents."""
    import litdata  # noqa: F401 - once, before the forks

    become_reaper()
    home = Path(tempfile.mkdtemp(prefix="chaos-control-"))
    outcomes = [run_control(seed, home) for seed in range(3)]
    for outcome in outcomes:
        print(json.dumps(outcome), flush=True)
    shutil.rmtree(home)
    return int(not any(lost_silently(outcome) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
