"""Parquet or JSON Lines files -> tokenised LitData chunks, one folder per node and split: `optimize_dataset`.

Comes in: a folder or URL of shards and a tokenizer folder. Goes out: `OUT/train/<node>/` and `OUT/val/<node>/`, each a
valid dataset by itself. Guarantees: the bytes are a function of the inputs and the settings alone; documents in = out +
dropped; killed at any moment, the same command goes on from the finished units and ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pretrainkit.documents import OnBadInput
from pretrainkit.errors import ConfigError, DatasetError, InputError, StorageError
from pretrainkit.executors import EXECUTORS, Executor
from pretrainkit.inputs import Inputs, find_inputs
from pretrainkit.metadata import Boundary
from pretrainkit.nodes import discard_records, finish_node, finished_units, node_folders, sweep_stages
from pretrainkit.plan import PLAN_FILENAME, Plan, PlanSettings, differences, make_plan
from pretrainkit.progress import Progress, in_words
from pretrainkit.records import Failure, UnitRecord, add_counts
from pretrainkit.sampling import sample_texts
from pretrainkit.signals import interruptible
from pretrainkit.storage import folder_lock, is_remote, join, read_bytes, write_atomic
from pretrainkit.tokenizers import AUTO, ENGINES
from pretrainkit.tokenizers.auto import EngineDisprovedError, choose_engine, reference_engine
from pretrainkit.tokenizers.folder import choose_boundary, choose_dtype, copy_tokenizer, read_tokenizer
from pretrainkit.topology import detect
from pretrainkit.unit import Job, UnitResult

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


def optimize_dataset(  # noqa: PLR0913 - these are the command's flags; they are grouped right below
    tokenizer_dir: Path,
    output_dir: str,
    input_dir: str | None = None,
    *,
    text_column: str = "text",
    boundary: Boundary | None = None,
    val_fraction: float = 0.0,
    val_dir: str | None = None,
    val_glob: str | None = None,
    block_size: int | None = None,
    chunk_bytes: int = 64 << 20,
    unit_bytes: int | None = None,
    engine: str = AUTO,
    on_bad_input: OnBadInput = "fail",
    executor: str = "auto",
    num_workers: int | None = None,
    ray_address: str | None = None,
    hf_dataset: str | None = None,
    hf_config: str = "default",
    split: str = "train",
    dry_run: bool = False,
) -> OptimizeSummary:
    """Tokenise Parquet or JSON Lines files into LitData chunks, one folder per node and split.

    Args:
        tokenizer_dir: Folder with tokenizer.json or tokenizer.model, and the names of BOS and EOS in its configuration.
        output_dir: Folder or URL to write; the same command on it again goes on where it was interrupted.
        input_dir: Folder or URL (s3://, gs://, hf://); every .parquet, .jsonl, .jsonl.gz and .jsonl.zst below is read.
        text_column: Column or key that holds the text.
        boundary: Marker written at the beginning (bos), the end (eos) or both of every document; by default eos where
            the tokenizer has one, else bos.
        val_fraction: Share of documents for validation, chosen by a hash of their text; 0 for none.
        val_dir: Folder or URL whose files are the validation split.
        val_glob: Pattern of file names below input_dir that are the validation split instead.
        block_size: Tokens per training block as stored (a model's block_size + 1): chunks then hold whole blocks.
        chunk_bytes: Size of a chunk's tokens.
        unit_bytes: Text per work unit; by default a 256th of the input, 4 MiB at least and 128 MiB at most.
        engine: Tokenizer engine: auto, gigatoken, tokenizers or sentencepiece. auto takes the fast one where it is
            proven equal to the reference.
        on_bad_input: fail ends with an error that lists what could not be read; skip leaves it out and counts it.
        executor: local, ray, static (the ranks of srun, torchrun or a Kubernetes job), or auto: static where such ranks
            are seen, else local.
        num_workers: Worker processes; by default every CPU granted. 0 works in this process.
        ray_address: Ray cluster to join; by default the one found, else a new one on this machine.
        hf_dataset: Name of a dataset on the Hugging Face hub, instead of input_dir.
        hf_config: Its configuration.
        split: Its split.
        dry_run: Only say what there is and what it would cost.

    Returns:
        Counts of the whole dataset.

    Raises:
        ConfigError: Wrong or contradicting flags.
        InputError: Inputs that cannot be used.
        TokenizerError: A tokenizer that cannot be used.
        StorageError: An output that cannot be written, is in use, or was made with other inputs or settings.

    Example:
        >>> summary = optimize_dataset("tokenizer", "nodes", input_dir="corpus", val_fraction=0.001)
        >>> summary.tokens["train"]
    """
    start = time.monotonic()
    tokenizer_dir, output_dir = Path(tokenizer_dir), str(output_dir)
    if engine != AUTO:
        ENGINES.get(engine)
    runner: Executor = EXECUTORS.get(_choose_executor(executor))(num_workers, ray_address)
    tokenizer = read_tokenizer(tokenizer_dir)
    settings = PlanSettings(
        text_column=text_column,
        boundary=choose_boundary(boundary, tokenizer),
        block_size=block_size,
        chunk_bytes=chunk_bytes,
        val_fraction=val_fraction,
        engine=engine,
        unit_bytes=unit_bytes,
    )
    if val_fraction and (val_dir is not None or val_glob is not None):
        raise ConfigError("val_fraction and explicit validation files are two splits; give one")
    inputs = find_inputs(
        input_dir=None if input_dir is None else str(input_dir),
        val_dir=None if val_dir is None else str(val_dir),
        val_glob=val_glob,
        hf_dataset=hf_dataset,
        hf_config=hf_config,
        split=split,
    )
    with interruptible(f"what is finished in {output_dir} is kept: run the same command again to go on"):
        plan = make_plan(inputs.files, settings, tokenizer, choose_dtype(tokenizer), on_bad_input)
        if dry_run:
            return _say_estimate(plan, inputs, tokenizer_dir, output_dir, num_workers)
        plan = _resume_or_choose_engine(plan, inputs, tokenizer_dir, output_dir)
        with _output_lock(output_dir, runner):
            return _Optimization(inputs, tokenizer_dir, output_dir, on_bad_input, runner, start).run(plan)


def _choose_executor(name: str) -> str:
    if name != "auto":
        return name
    return "static" if detect(os.environ).world_size > 1 else "local"


@contextlib.contextmanager
def _output_lock(output_dir: str, executor: Executor) -> Iterator[None]:
    if is_remote(output_dir):  # object stores have no locks; two jobs of one plan write the same bytes
        yield
        return
    with folder_lock(output_dir, "optimize", shared=not executor.exclusive):
        yield


def _plan_on_disk(output_dir: str) -> Plan | None:
    path = join(output_dir, PLAN_FILENAME)
    try:
        return Plan.from_json(read_bytes(path).decode(), path)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise StorageError(f"output_dir={output_dir} is a file, or lies below one; give a folder") from error


def _resume_or_choose_engine(plan: Plan, inputs: Inputs, tokenizer_dir: Path, output_dir: str) -> Plan:
    """The plan in the output folder where it is the same; otherwise the new one, with its engine settled."""
    old = _plan_on_disk(output_dir)
    if old is not None:
        _refuse_other_plan(old, plan, output_dir)
        return old
    _refuse_other_data(output_dir)
    if plan.settings.engine != AUTO:
        return plan
    engine = choose_engine(tokenizer_dir, sample_texts(plan, inputs.roots))
    return dataclasses.replace(plan, engine=engine)


def _refuse_other_plan(old: Plan, new: Plan, output_dir: str) -> None:
    changes = differences(old, new)
    if changes:
        shown = "; ".join(changes[:6]) + ("; ..." if len(changes) > 6 else "")
        raise StorageError(
            f"{output_dir} was made with other inputs or settings: {shown}. Use another output_dir, or the old settings"
        )


def _refuse_other_data(output_dir: str) -> None:
    if is_remote(output_dir) or not Path(output_dir).exists():
        return
    if not Path(output_dir).is_dir():
        raise StorageError(f"output_dir={output_dir} is a file; give a folder")
    names = sorted(entry.name for entry in os.scandir(output_dir) if entry.name != ".lock")
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise StorageError(f"output_dir={output_dir} already holds other data ({shown}); give an empty or new folder")


class _Optimization:
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
        while True:
            plan = self._settle(plan)
            self._failures = []
            try:
                self._work(plan)
            except EngineDisprovedError as error:
                plan = self._distrust_engine(plan, error)
                continue
            on_disk = _plan_on_disk(self._output_dir)
            if on_disk is not None and on_disk.id != plan.id:  # another rank distrusts the engine
                plan = on_disk
                continue
            return self._finish(plan)

    def _settle(self, plan: Plan) -> Plan:
        """Write the plan, unless an equal one is there, whose engine counts."""
        on_disk = _plan_on_disk(self._output_dir)
        if on_disk is not None:
            _refuse_other_plan(on_disk, plan, self._output_dir)
            return on_disk
        write_atomic(join(self._output_dir, PLAN_FILENAME), plan.to_json())
        if not is_remote(self._output_dir):
            copy_tokenizer(self._tokenizer_dir, Path(self._output_dir) / "tokenizer")
        return plan

    def _work(self, plan: Plan) -> None:
        done = finished_units(self._output_dir, plan)
        mine = self._executor.share(range(len(plan.units)))
        pending = [unit for unit in mine if unit not in done]
        if not pending:
            return
        if len(pending) < len(mine):
            logger.info("%d of %d units are finished already", len(mine) - len(pending), len(mine))
        job = Job(
            output_dir=self._output_dir if is_remote(self._output_dir) else os.path.abspath(self._output_dir),
            plan_id=plan.id,
            roots={
                split: root if is_remote(root) else os.path.abspath(root) for split, root in self._inputs.roots.items()
            },
            tokenizer_dir=os.path.abspath(self._tokenizer_dir),
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
            if not is_remote(self._output_dir):
                sweep_stages(self._output_dir)

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
        missing = [unit for unit in self._executor.share(range(len(plan.units))) if unit not in done]
        self._write_failures(done)
        if missing:
            raise self._bad_input(missing)
        for node in self._executor.nodes() or node_folders(self._output_dir, "train"):
            finish_node(self._output_dir, node, plan, self._tokenizer_dir)
        return self._summary(plan, done)

    def _write_failures(self, done: dict[int, UnitRecord]) -> None:
        """failures.jsonl: what finished units left out, and what kept others from being finished."""
        rows = [(unit, failure) for unit, record in done.items() for failure in record.failures]
        rows += [(unit, failure) for unit, failure in self._failures if unit not in done]
        if rows:
            rows.sort(key=lambda row: row[0])
            lines = [json.dumps({"unit": unit, **vars(failure)}, sort_keys=True) for unit, failure in rows]
            write_atomic(join(self._output_dir, FAILURES_FILENAME), "\n".join(lines) + "\n")

    def _bad_input(self, missing: list[int]) -> InputError | DatasetError:
        if not self._failures:
            return DatasetError(f"{len(missing)} finished unit(s) have vanished from {self._output_dir}; run again")
        _, first = self._failures[0]
        numbers = (("row group", first.row_group), ("row", first.row))
        place = ", ".join([first.shard, *(f"{name} {value}" for name, value in numbers if value is not None)])
        return InputError(
            f"{len(self._failures)} piece(s) of input cannot be used, listed in "
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


def _log_summary(summary: OptimizeSummary) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.dropped.items())
    for split, tokens in summary.tokens.items():
        logger.info(
            "%s: %s documents, %s tokens in %s",
            split,
            f"{summary.documents[split]:,}",
            f"{tokens:,}",
            join(summary.output_dir, split),
        )
    logger.info(
        "%s rows in = %s out + %s dropped%s; engine %s; %s",
        f"{summary.documents_in:,}",
        f"{sum(summary.documents.values()):,}",
        f"{sum(summary.dropped.values()):,}",
        f" ({reasons})" if reasons else "",
        summary.engine,
        in_words(summary.seconds),
    )
    if summary.units < summary.units_planned:
        logger.info("%d of %d units are finished; other ranks do the rest", summary.units, summary.units_planned)


def _say_estimate(
    plan: Plan, inputs: Inputs, tokenizer_dir: Path, output_dir: str, num_workers: int | None
) -> OptimizeSummary:
    from pretrainkit.sampling import estimate

    for line in estimate(plan, inputs.roots, tokenizer_dir, num_workers):
        logger.info("%s", line)
    return OptimizeSummary(output_dir=output_dir, engine=plan.engine, units=0, units_planned=len(plan.units))
