"""One run of a job whose inputs and output are settled: work, fall back, finish, account.

Comes in: a plan, and an executor to do its units. Goes out: complete node folders and a summary. Guarantees: when it
ends well, every unit of this process's share is done by an engine that is still trusted, and documents in = out +
dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrainkit.documents import OnBadInput
from pretrainkit.errors import DatasetError, InputError, StorageError
from pretrainkit.executors import Executor
from pretrainkit.locks import folder_lock
from pretrainkit.optimize.inputs import Inputs
from pretrainkit.plan import PLAN_FILENAME, Plan, differences
from pretrainkit.progress import Progress, in_words
from pretrainkit.records import Failure, UnitRecord, add_counts
from pretrainkit.statistics import counted
from pretrainkit.storage import exists, is_remote, join, read_bytes, remove, storage_errors, write_atomic
from pretrainkit.tokenizers.auto import EngineDisprovedError, reference_engine
from pretrainkit.tokenizers.folder import copy_tokenizer, special_ids
from pretrainkit.units.nodes import discard_records, finish_node, finished_units, node_folders, sweep
from pretrainkit.units.work import Job, UnitResult

logger = logging.getLogger(__name__)

FAILURES_FILENAME = "failures.jsonl"


@dataclass(frozen=True, kw_only=True)
class OptimizeSummary:
    """What a job came to."""

    output_dir: str
    """Where the dataset lies."""
    engine: str
    """Engine that made the ids."""
    units: int
    """Units finished, by this run and before."""
    units_planned: int
    """Units in all; more than `units` only where other ranks are still at work."""
    documents_in: int = 0
    """Rows read."""
    documents: dict[str, int] = field(default_factory=dict)
    """Split -> documents kept."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Split -> tokens, boundary markers included."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents kept."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason; documents_in = sum(documents) + sum(dropped)."""
    seconds: float = 0.0
    """Time of this run."""


class Optimization:
    """One run of a job whose inputs and output are settled and locked."""

    def __init__(
        self,
        inputs: Inputs,
        tokenizer_dir: Path,
        output_dir: str,
        on_bad_input: OnBadInput,
        executor: Executor,
        start: float,
    ) -> None:
        self._inputs, self._tokenizer_dir, self._output_dir = inputs, tokenizer_dir, output_dir
        self._on_bad_input, self._executor, self._start = on_bad_input, executor, start
        self._failures: list[tuple[int, Failure]] = []

    def run(self, plan: Plan) -> OptimizeSummary:
        """Work until every unit of this process's share is done with an engine that is still trusted."""
        try:
            return self._run(plan)
        finally:
            if not is_remote(self._output_dir):  # also what an earlier run left, when nothing was to do
                sweep(self._output_dir)

    def _run(self, plan: Plan) -> OptimizeSummary:
        while True:
            plan = self._settle(plan)
            self._failures = []
            try:
                self._work(plan)
            except EngineDisprovedError as error:
                plan = self._distrust_engine(plan, error)
                continue
            on_disk = plan_on_disk(self._output_dir)
            if on_disk is not None and on_disk.id != plan.id:  # another rank distrusts the engine
                plan = on_disk
                continue
            return self._finish(plan)

    def _settle(self, plan: Plan) -> Plan:
        """Write the plan, unless an equal one is there, whose engine counts."""
        on_disk = plan_on_disk(self._output_dir)
        if on_disk is not None:
            refuse_other_plan(on_disk, plan, self._output_dir)
            plan = on_disk
        else:
            write_atomic(join(self._output_dir, PLAN_FILENAME), plan.to_json())
        if not is_remote(self._output_dir):  # on every run: the last one may have died while copying
            copy_tokenizer(self._tokenizer_dir, Path(self._output_dir) / "tokenizer")
        return plan

    def _work(self, plan: Plan) -> None:
        done = finished_units(self._output_dir, plan)
        mine = self._executor.share(range(len(plan.units)))
        pending = [unit for unit in mine if unit not in done]
        if not pending:
            return
        if len(pending) < len(mine):
            logger.info("%d of %s finished already", len(mine) - len(pending), counted(len(mine), "unit"))
        job = Job(
            output_dir=_absolute(self._output_dir),
            plan_id=plan.id,
            train_root=_absolute(self._inputs.roots["train"]),
            val_root=_absolute(self._inputs.roots["val"]),
            tokenizer_dir=os.path.abspath(self._tokenizer_dir),
            special_ids=special_ids(self._tokenizer_dir, plan.tokenizer),
            on_bad_input=self._on_bad_input,
        )
        total = sum(plan.units[unit].text_bytes for unit in mine)
        left = sum(plan.units[unit].text_bytes for unit in pending)
        progress = Progress(
            total_bytes=total, done_bytes=total - left, units=len(mine), done_units=len(mine) - len(pending)
        )

        def take(result: UnitResult) -> None:
            if result.disproved is not None:
                raise EngineDisprovedError(result.disproved)
            self._failures += [(result.unit, failure) for failure in result.failures]
            progress.add(plan.units[result.unit].text_bytes, result.text_bytes, result.tokens)

        try:
            self._executor.run(job, pending, take)
        finally:
            progress.close()

    def _distrust_engine(self, plan: Plan, error: EngineDisprovedError) -> Plan:
        """Make a new plan with the reference engine; what the fast one made no longer counts."""
        reference = reference_engine(self._tokenizer_dir)
        logger.warning("falling back from %s to %s and doing everything again: %s", plan.engine, reference, error)
        new = dataclasses.replace(plan, engine=reference)
        # The plan first: from here on the old records are those of another plan.
        write_atomic(join(self._output_dir, PLAN_FILENAME), new.to_json())
        discard_records(self._output_dir, plan)
        return new

    def _finish(self, plan: Plan) -> OptimizeSummary:
        done = finished_units(self._output_dir, plan)
        mine = self._executor.share(range(len(plan.units)))
        missing = [unit for unit in mine if unit not in done]
        self._write_failures(done, mine)
        if missing:
            raise self._bad_input(missing)
        for node in self._executor.nodes() or node_folders(self._output_dir, "train"):
            finish_node(self._output_dir, node, plan, self._tokenizer_dir)
        return self._summary(plan, done)

    def _write_failures(self, done: dict[int, UnitRecord], mine: list[int]) -> None:
        """failures.jsonl: what finished units left out, and what kept others from being finished."""
        path = join(self._output_dir, FAILURES_FILENAME)
        found = [(unit, failure) for unit, record in done.items() for failure in record.failures]
        found += [(unit, failure) for unit, failure in self._failures if unit not in done]
        rows = [{"unit": unit, **vars(failure)} for unit, failure in found]
        if not rows and not exists(path):
            return
        # Several ranks may get here at once, and each knows of its own unfinished units alone.
        alone = self._executor.exclusive or is_remote(self._output_dir)
        lock = (
            contextlib.nullcontext() if alone else folder_lock(join(self._output_dir, "train"), "optimize", wait=True)
        )
        with lock:
            rows += [row for row in _rows_on_disk(path) if row["unit"] not in {*done, *mine}]
            rows.sort(key=lambda row: row["unit"])
            if rows:
                write_atomic(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
            else:
                remove(path)

    def _bad_input(self, missing: list[int]) -> InputError | DatasetError:
        if not self._failures:
            return DatasetError(f"{counted(len(missing), 'finished unit')} vanished from {self._output_dir}; run again")
        _, first = self._failures[0]
        numbers = (("row group", first.row_group), ("row", first.row))
        place = ", ".join([first.shard, *(f"{name} {value}" for name, value in numbers if value is not None)])
        return InputError(
            f"{counted(len(self._failures), 'piece')} of input cannot be used, listed in "
            f"{join(self._output_dir, FAILURES_FILENAME)}; first: {place}: {first.detail}. Everything else is done; "
            "run again with --on_bad_input=skip to leave them out and count them"
        )

    def _summary(self, plan: Plan, done: dict[int, UnitRecord]) -> OptimizeSummary:
        records = list(done.values())
        summary = OptimizeSummary(
            output_dir=self._output_dir,
            engine=plan.engine,
            units=len(done),
            units_planned=len(plan.units),
            documents_in=sum(record.documents_in for record in records),
            documents={s: sum(r.splits[s].documents for r in records) for s in plan.splits},
            tokens={s: sum(r.splits[s].tokens for r in records) for s in plan.splits},
            text_bytes=sum(r.splits[s].text_bytes for r in records for s in plan.splits),
            dropped=add_counts(record.dropped for record in records),
            seconds=time.monotonic() - self._start,
        )
        kept, dropped = sum(summary.documents.values()), sum(summary.dropped.values())
        if summary.documents_in != kept + dropped:
            raise DatasetError(
                f"{summary.documents_in} rows read, {kept} kept and {dropped} dropped do not add up in "
                f"{self._output_dir}; this is a bug, please report it with plan.json"
            )
        _log_summary(summary)
        return summary


def _rows_on_disk(path: str) -> list[dict[str, Any]]:
    """What a failures.jsonl tells; [] where there is none."""
    try:
        return [json.loads(line) for line in read_bytes(path).splitlines()]
    except (FileNotFoundError, ValueError):
        return []


def _absolute(path: str) -> str:
    """A path that means the same in a worker, whose working folder is another."""
    return path if is_remote(path) else os.path.abspath(path)


def _log_summary(summary: OptimizeSummary) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.dropped.items())
    for split, tokens in summary.tokens.items():
        logger.info(
            "%s: %s, %s in %s",
            split,
            counted(summary.documents[split], "document"),
            counted(tokens, "token"),
            join(summary.output_dir, split),
        )
    logger.info(
        "%s in = %s out + %s dropped%s; engine %s; %s",
        counted(summary.documents_in, "row"),
        f"{sum(summary.documents.values()):,}",
        f"{sum(summary.dropped.values()):,}",
        f" ({reasons})" if reasons else "",
        summary.engine,
        in_words(summary.seconds),
    )
    if summary.units < summary.units_planned:
        logger.info("%d of %s finished; other ranks do the rest", summary.units, counted(summary.units_planned, "unit"))


def plan_on_disk(output_dir: str) -> Plan | None:
    """The plan in an output folder, or None where there is none.

    Raises:
        DatasetError: It is damaged.
        StorageError: The path is no folder, or cannot be read.
    """
    path = join(output_dir, PLAN_FILENAME)
    with storage_errors(f"read {path}"):
        try:
            return Plan.from_json(read_bytes(path).decode(errors="replace"), path)
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise StorageError(f"output_dir={output_dir} is a file, or lies below one; give a folder") from error


def refuse_other_plan(old: Plan, new: Plan, output_dir: str) -> None:
    """Let a job go on only with the inputs and settings it was begun with.

    Raises:
        StorageError: Something differs; the message says what.
    """
    changes = differences(old, new)
    if changes:
        shown = "; ".join(changes[:6]) + ("; ..." if len(changes) > 6 else "")
        raise StorageError(
            f"{output_dir} was made with other inputs or settings: {shown}. Use another output_dir, or the old settings"
        )
