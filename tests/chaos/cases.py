"""One chaos case: optimize and merge under seeded kills, rerun to exit code 0, compared with the undisturbed run.

Everything a case does follows from its seed: the settings, the number of nodes and workers, who is killed and when.
Half of the kills come at a moment in time, half right before the n-th change of the disk, which replays exactly.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pretrainkit.executors.local
import pretrainkit.merge  # imported before the forks, so that no case pays for it
import pretrainkit.optimize
import pretrainkit.tokenizers.gigatoken
import pretrainkit.tokenizers.huggingface
from tests.chaos import oracle
from tests.chaos.processes import ForkedWorker, pick_worker, reap_orphans, start, wait_or_kill
from tests.conftest import make_texts, make_tokenizer, write_parquet

SPLITS = ("train", "val")
_ORPHANS_END_WITHIN_S = 10.0

# Each covers another path to the disk: whole documents, blocks with remainders, joined and linked chunks, both markers.
VARIANTS: list[dict[str, Any]] = [
    {"chunk_bytes": 1024, "boundary": "eos"},
    {"chunk_bytes": 1024, "boundary": "bos", "block_size": 33},
    {"chunk_bytes": 1 << 20, "boundary": "both"},
    {"chunk_bytes": 4096, "boundary": "eos", "block_size": 129, "engine": "auto"},
]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One variant's undisturbed run."""

    settings: dict[str, Any]
    """Keyword arguments of optimize_dataset."""
    merged: dict[str, bytes]
    """Every file of the merged dataset, both splits."""
    documents: int
    """Documents in the corpus."""
    marker: int
    """Id that stands once in every document."""
    seconds: float
    """What optimize took."""
    merge_seconds: float
    """What merging both splits took."""


@dataclass(kw_only=True)
class Report:
    """What a case did."""

    seed: int
    """Its seed."""
    kills: Counter[str] = field(default_factory=Counter)
    """Kind of victim -> processes that died of SIGKILL."""
    problems: list[str] = field(default_factory=list)
    """Everything the oracle found; [] when the case passed."""


def _early(generator: random.Random, most: int) -> int:
    """A number from 1 to `most`, as often below ten as above: the first changes are those of plans, marks and locks."""
    return int(math.exp(generator.uniform(0, math.log(most + 1))))


class Chaos:
    """The corpus, the undisturbed runs, and the cases.

    Args:
        home: Folder for everything.
        elsewhere: Folder on another file system, or None; some cases merge into it.
    """

    def __init__(self, home: Path, elsewhere: Path | None = None) -> None:
        self._home, self._elsewhere = home, elsewhere
        self._corpus, self._tokenizer = home / "corpus", home / "tokenizer"
        texts = make_texts(240, seed=7)
        make_tokenizer(self._tokenizer, vocab_size=512)
        for shard in range(3):
            rows = [*texts[shard::3], None, ""]
            write_parquet(self._corpus / f"{shard}.parquet", rows, row_group_size=16)
        self.references = [self._undisturbed(number, settings) for number, settings in enumerate(VARIANTS)]

    def _undisturbed(self, number: int, variant: dict[str, Any]) -> Reference:
        settings = {"val_fraction": 0.1, "unit_bytes": 10_000, "engine": "gigatoken", **variant}
        folder = self._home / f"undisturbed-{number}"
        begun = time.monotonic()
        log = self._home / "undisturbed.log"
        codes = [*wait_or_kill([start(lambda: self._optimize(folder, settings, 0), log, {})], None, list)]
        middle = time.monotonic()
        for split in SPLITS:
            codes += wait_or_kill([start(lambda s=split: self._merge(folder, folder, s, "copy"), log, {})], None, list)
        if any(codes):
            raise RuntimeError(f"the undisturbed run ended with {codes}: {log.read_text()}")
        merged = {
            f"{split}/{name}": data for split in SPLITS for name, data in oracle.tree(folder / "merged" / split).items()
        }
        marker = 510 if variant["boundary"] == "bos" else 511
        documents = sum(oracle.count_documents(folder / split, marker) for split in SPLITS)
        if documents != 240:
            raise RuntimeError(f"the undisturbed run has {documents} documents")
        return Reference(
            settings=settings,
            merged=merged,
            documents=documents,
            marker=marker,
            seconds=middle - begun,
            merge_seconds=time.monotonic() - middle,
        )

    def _optimize(self, out: Path, settings: dict[str, Any], workers: int, executor: str = "local") -> None:
        pretrainkit.optimize.optimize_dataset(
            self._tokenizer, str(out), str(self._corpus), num_workers=workers, executor=executor, **settings
        )

    def _merge(self, out: Path, data: Path, split: str, mode: Any) -> None:
        pretrainkit.merge.merge_datasets(out / split, data / "merged" / split, mode=mode)

    def run_case(self, seed: int) -> Report:
        """Do everything a seed stands for, and judge it."""
        generator = random.Random(seed)
        report = Report(seed=seed)
        reference = generator.choice(self.references)
        out = self._home / f"case-{seed}"
        far = self._elsewhere is not None and generator.random() < 0.25
        data = (self._elsewhere if far and self._elsewhere else self._home) / f"case-{seed}-data"
        try:
            self._disturb_optimize(generator, reference, out, report)
            self._finish_optimize(generator, reference, out, report)
            self._disturb_merge(generator, reference, out, data, report)
            self._judge(reference, out, data, report)
        except Exception as error:  # noqa: BLE001 - a case that cannot be judged has failed, and the others go on
            report.problems.append(repr(error))
        if not report.problems:
            for folder in (out, data):
                shutil.rmtree(folder, ignore_errors=True)
        return report

    def _disturb_optimize(self, generator: random.Random, reference: Reference, out: Path, report: Report) -> None:
        for _ in range(generator.randint(1, 3)):
            victim = generator.choice(["driver", "driver", "worker", "everything"])
            at_change = _early(generator, 250) if generator.random() < 0.5 else None
            after_s = None if at_change else generator.uniform(0, 1.2 * reference.seconds)
            nodes = generator.choice([1, 1, 2, 3])
            least = 1 if victim == "worker" else 0
            workers = generator.randint(least, 3) if nodes == 1 else generator.randint(least, 1)
            pids = self._start_drivers(generator, reference, out, nodes, workers, victim, at_change)
            choices: dict[str, Callable[[list[int]], list[int]]] = {
                "driver": lambda alive: [generator.choice(sorted(alive))],
                "worker": pick_worker(generator),
                "everything": lambda alive: alive,
            }
            codes = wait_or_kill(pids, after_s, choices[victim])
            allowed = {0} if victim == "worker" else {0, -9}
            self._after_attempt(f"optimize with a dying {victim}", codes, allowed, out, report)
            report.kills[f"optimize {victim}"] += codes.count(-9) if victim != "worker" else int(self._worker_died(out))

    def _worker_died(self, out: Path) -> bool:
        log = self._log(out).read_text()
        return "a worker died" in log[log.rfind("=== attempt") :]

    def _log(self, folder: Path) -> Path:
        return folder.with_name(folder.name + ".log")

    def _start_drivers(
        self,
        generator: random.Random,
        reference: Reference,
        out: Path,
        nodes: int,
        workers: int,
        victim: str | None = None,
        at_change: int | None = None,
    ) -> list[int]:
        """One driver, or the ranks of several nodes; with `at_change`, one of them or its worker dies there."""
        with self._log(out).open("a") as log:
            log.write("=== attempt\n")
        doomed = generator.randrange(nodes)
        pids = []
        for rank in range(nodes):
            environ = {"SLURMD_NODENAME": f"node{rank if nodes > 1 else generator.randrange(3)}"}
            if nodes > 1:
                environ |= {"RANK": str(rank), "WORLD_SIZE": str(nodes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            dies = at_change is not None and (victim == "everything" or rank == doomed)

            def drive(dies: bool = dies) -> None:
                pretrainkit.executors.local.subprocess.Popen = ForkedWorker  # type: ignore[assignment, misc]
                if dies and victim == "worker":
                    ForkedWorker.victim, ForkedWorker.die_at = 1, at_change or 0
                self._optimize(out, reference.settings, workers, "static" if nodes > 1 else "local")

            die_at = at_change if dies and victim != "worker" else None
            pids.append(start(drive, self._log(out), environ, die_at))
        return pids

    def _finish_optimize(self, generator: random.Random, reference: Reference, out: Path, report: Report) -> None:
        nodes = generator.choice([1, 1, 3])
        codes = wait_or_kill(self._start_drivers(generator, reference, out, nodes, 0), None, list)
        self._after_attempt("the rerun of optimize", codes, {0}, out, report)
        found = sum(oracle.count_documents(out / split, reference.marker) for split in SPLITS)
        if found != reference.documents:
            report.problems.append(f"{found} documents in the nodes' folders, {reference.documents} in the corpus")

    def _after_attempt(self, what: str, codes: Sequence[int], allowed: set[int], out: Path, report: Report) -> None:
        left = reap_orphans(_ORPHANS_END_WITHIN_S)
        if left:
            report.problems.append(f"{what}: {len(left)} processes were left")
        if not set(codes) <= allowed:
            report.problems.append(f"{what}: exit codes {codes}; see {self._log(out)}")
        for index in out.glob("*/*/index.json"):
            report.problems += [f"{what}: {problem}" for problem in oracle.check_visible(index.parent)]

    def _disturb_merge(
        self, generator: random.Random, reference: Reference, out: Path, data: Path, report: Report
    ) -> None:
        mode = generator.choice(["auto", "copy", "move"])
        for split in SPLITS:
            expected = {
                name.removeprefix(f"{split}/"): content
                for name, content in reference.merged.items()
                if name.startswith(f"{split}/")
            }
            for _ in range(generator.randint(1, 3)):
                at_change = _early(generator, 80) if generator.random() < 0.5 else None
                after_s = None if at_change else generator.uniform(0, 0.6 * reference.merge_seconds)
                pid = start(lambda s=split: self._merge(out, data, s, mode), self._log(out), {}, at_change)
                codes = wait_or_kill([pid], after_s, list)
                report.kills["merge"] += codes.count(-9)
                if not set(codes) <= {0, -9}:
                    report.problems.append(f"merge: exit codes {codes}; see {self._log(out)}")
                target = data / "merged" / split
                if (target / "index.json").exists():
                    problems = oracle.differences(oracle.tree(target), expected)
                    report.problems += [f"visible before it was complete: {problem}" for problem in problems]
            pid = start(lambda s=split: self._merge(out, data, s, mode), self._log(out), {})
            codes = wait_or_kill([pid], None, list)
            if codes != [0]:
                report.problems.append(f"the rerun of merge ended with {codes}; see {self._log(out)}")

    def _judge(self, reference: Reference, out: Path, data: Path, report: Report) -> None:
        merged = {
            f"{split}/{name}": content
            for split in SPLITS
            for name, content in oracle.tree(data / "merged" / split).items()
        }
        report.problems += oracle.differences(merged, reference.merged)
        if reap_orphans(_ORPHANS_END_WITHIN_S):
            report.problems.append("processes were left at the end")
        leftovers = [path for path in out.rglob(".*") if path.name != ".lock"]
        report.problems += [f"left behind: {path.relative_to(out)}" for path in leftovers]
