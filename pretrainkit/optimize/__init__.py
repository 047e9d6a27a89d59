"""Parquet or JSON Lines files -> tokenised LitData chunks, one folder per node and split: `optimize_dataset`.

Comes in: a folder or URL of shards and a tokenizer folder. Goes out: `OUT/train/<node>/` and `OUT/val/<node>/`, each a
valid dataset by itself. Guarantees: the bytes are a function of the inputs and the settings alone; documents in = out +
dropped; killed at any moment, the same command goes on from the finished units and ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pretrainkit.documents import OnBadInput
from pretrainkit.errors import ConfigError, StorageError
from pretrainkit.executors import EXECUTORS, Executor
from pretrainkit.locks import folder_lock
from pretrainkit.metadata import Boundary
from pretrainkit.optimize.inputs import Inputs, find_inputs
from pretrainkit.optimize.job import Optimization, OptimizeSummary, plan_on_disk, refuse_other_plan
from pretrainkit.optimize.sampling import sample_texts
from pretrainkit.plan import PLAN_FILENAME, Plan, PlanSettings, make_plan
from pretrainkit.signals import interruptible
from pretrainkit.storage import given_path, is_remote
from pretrainkit.tokenizers import AUTO, ENGINES
from pretrainkit.tokenizers.auto import FAST_ENGINE, choose_engine, reference_engine
from pretrainkit.tokenizers.folder import choose_boundary, choose_dtype, read_tokenizer
from pretrainkit.topology import detect

logger = logging.getLogger(__name__)


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
        unit_bytes: Text per work unit; by default a 256th of the input, about 8 MiB at least and 128 MiB at most.
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
    tokenizer_dir = Path(given_path(tokenizer_dir, "tokenizer_dir"))
    output_dir = given_path(output_dir, "output_dir")
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
        input_dir=None if input_dir is None else given_path(input_dir, "input_dir"),
        val_dir=None if val_dir is None else given_path(val_dir, "val_dir"),
        val_glob=val_glob,
        hf_dataset=hf_dataset,
        hf_config=hf_config,
        split=split,
    )
    with interruptible(f"what is finished in {output_dir} is kept: run the same command again to go on"):
        plan = make_plan(inputs.files, settings, tokenizer, choose_dtype(tokenizer), on_bad_input)
        if dry_run:
            return _say_estimate(plan, inputs, tokenizer_dir, output_dir, num_workers)
        with contextlib.ExitStack() as job:
            if plan_on_disk(output_dir) is None:
                # Workers take seconds to start: they load what they will need while the engine is being proven.
                engines = (FAST_ENGINE, reference_engine(tokenizer_dir)) if engine == AUTO else (engine,)
                job.enter_context(runner.warm_up(os.path.abspath(tokenizer_dir), engines, len(plan.units)))
            plan = _resume_or_choose_engine(plan, inputs, tokenizer_dir, output_dir)
            job.enter_context(_output_lock(output_dir, runner))
            return Optimization(inputs, tokenizer_dir, output_dir, on_bad_input, runner, start).run(plan)


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


def _resume_or_choose_engine(plan: Plan, inputs: Inputs, tokenizer_dir: Path, output_dir: str) -> Plan:
    """The plan in the output folder where it is the same; otherwise the new one, with its engine settled."""
    old = plan_on_disk(output_dir)
    if old is not None:
        refuse_other_plan(old, plan, output_dir)
        return old
    _refuse_other_data(output_dir)
    if plan.settings.engine != AUTO:
        return plan
    engine = choose_engine(tokenizer_dir, sample_texts(plan, inputs.roots))
    return dataclasses.replace(plan, engine=engine)


def _refuse_other_data(output_dir: str) -> None:
    if is_remote(output_dir) or not Path(output_dir).exists():
        return
    if not Path(output_dir).is_dir():
        raise StorageError(f"output_dir={output_dir} is a file; give a folder")
    # Hidden names are ours: the lock, and what a driver that was killed while it wrote its plan left behind.
    names = sorted(entry.name for entry in os.scandir(output_dir) if not entry.name.startswith("."))
    if names and PLAN_FILENAME not in names:  # a plan by now: another rank was faster, and the plans are compared next
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise StorageError(f"output_dir={output_dir} already holds other data ({shown}); give an empty or new folder")


def _say_estimate(
    plan: Plan, inputs: Inputs, tokenizer_dir: Path, output_dir: str, num_workers: int | None
) -> OptimizeSummary:
    from pretrainkit.optimize.sampling import estimate

    for line in estimate(plan, inputs.roots, tokenizer_dir, num_workers):
        logger.info("%s", line)
    return OptimizeSummary(output_dir=output_dir, engine=plan.engine, units=0, units_planned=len(plan.units))
