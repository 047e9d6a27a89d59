"""From a configuration to a running training process.

Comes in: the configuration, in every process of the run. Goes out: a trained model. Guarantees: whatever can be found
wrong is found before a device holds a model; every rank agrees on where to start; a continued run says what is
different.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import CheckpointError, Interrupted
from pretrainkit.leave import note_process_group
from pretrainkit.locks import folder_lock
from pretrainkit.memory import keep_all_freed_memory
from pretrainkit.models import flops_per_token, num_parameters
from pretrainkit.storage import storage_errors, write_atomic
from pretrainkit.stream import BlockLoader, ValidationLoader
from pretrainkit.topology import detect
from pretrainkit.train import run_folder
from pretrainkit.train.arithmetic import RunPlan
from pretrainkit.train.checkpoint import CheckpointWriter
from pretrainkit.train.evaluation import open_validation
from pretrainkit.train.facts import (
    Facts,
    check_beginning,
    check_no_run,
    check_nothing_foreign,
    look_at,
    new_model,
    nothing_to_resume,
    open_training_sources,
    plan_from,
)
from pretrainkit.train.guard import Guard
from pretrainkit.train.initial import load_initial
from pretrainkit.train.loop import fit
from pretrainkit.train.manifest import MANIFEST_FILENAME, read_manifest
from pretrainkit.train.metrics import METRICS_FILENAME, MetricsWriter, Speed, earlier_starts, peak_flops
from pretrainkit.train.optimizer import build_optimizer
from pretrainkit.train.parallel import cpu_group, gather_objects, set_up_model, start_fabric, together
from pretrainkit.train.run import Run
from pretrainkit.train.schedule import plan_course
from pretrainkit.train.side_files import SideFiles
from pretrainkit.train.signals import Ballot, SignalWatch
from pretrainkit.train.snapshot import Snapshots
from pretrainkit.train.state import TrainState, config_to_dict, read_record
from pretrainkit.train.watchdog import Watchdog
from pretrainkit.train.window import Window

logger = logging.getLogger(__name__)

# A scheduler signals one process after the other: the first may be gone before the last one has heard.
_SIGNAL_GRACE_S = 2.0
# A process that was killed may take a moment to be gone when its successor is there already.
_HOLDER_GRACE_S = 5.0


def train_process(config: PretrainConfig, begun: float) -> None:
    """This process's part of a run; its place is read from the environment.

    Args:
        config: The same in every process.
        begun: When the run began, in `time.monotonic()`: what `train.max_time` counts from.

    Raises:
        PretrainKitError: Whatever is wrong with the configuration, the data or a checkpoint, the same on every rank.
    """
    keep_all_freed_memory()
    topology = detect(os.environ)
    facts = look_at(config, topology.world_size)
    fabric = start_fabric(config, topology)
    try:
        with contextlib.ExitStack() as held:
            _train(config, facts, fabric, begun, held)
    finally:
        if torch.distributed.is_initialized():
            note_process_group()
            torch.distributed.destroy_process_group()


def _train(config: PretrainConfig, facts: Facts, fabric: Any, begun: float, held: contextlib.ExitStack) -> None:
    group = cpu_group()
    rank, world_size = fabric.global_rank, fabric.world_size
    is_new = gather_objects(not config.out_dir.is_dir(), group)[0]  # then the folder is made when nothing is wrong
    if not is_new:
        together(lambda: _hold_folder(config, rank, held), group)
    start = together(functools.partial(_starting_point, config, group, rank, world_size), group)
    if start is None:
        check_beginning(config)
    state = TrainState() if start is None else read_record(start)["state"]
    plan = plan_from(state, config, facts)
    if start is not None and _is_finished(config, start, state.step, plan, group, rank, world_size):
        if rank == 0:
            logger.info("this run is finished: %s", config.out_dir / run_folder.FINAL_FOLDER)
        return
    validates = config.eval.interval or config.eval.initial_validation or config.eval.final_validation
    validation = together(
        lambda: open_validation(config, facts, rank=rank, world_size=world_size) if validates else {}, group
    )
    together(lambda: _check_files(facts, validation) if rank == 0 else None, group)
    side_files = together(
        lambda: SideFiles(config, facts.model_config, facts.sources[0].folder, speak=rank == 0), group
    )
    model = new_model(config, facts, fabric.device)
    wrapped = set_up_model(fabric, model, config)
    optimizers = build_optimizer(model, config.optimizer)
    guard = Guard(config.guard, fabric.device)
    window = Window(fabric.device, world_size, state)
    snapshots = Snapshots(config, facts, model, optimizers, guard, window, state, group)
    changed: list[str] = []
    if start is not None:
        changed = snapshots.resume(start, rank=rank)
    else:
        load_initial(config, model, snapshots, state, group)
    state.portions = plan.portions
    if is_new:
        together(lambda: _hold_new_folder(config, rank, held), group)
    metrics = together(lambda: _open_folder(config, state, rank, start), group)
    if rank == 0:
        _introduce(config, facts, plan, fabric)
    metrics.write(
        "resume" if start else "start", state, world_size=world_size, samples=state.samples, changed=changed or None
    )
    watchdog = Watchdog(config.out_dir, rank, config.compute.hang_timeout_s)
    run = Run(
        config=config,
        plan=plan,
        course=plan_course(plan, config.train, config.schedule, config.optimizer),
        plan_from=functools.partial(plan_from, config=config, facts=facts),
        speed=_speed(config, facts, fabric),
        fabric=fabric,
        model=wrapped,
        bare_model=model,
        optimizers=optimizers,
        guard=guard,
        window=window,
        state=state,
        open_loader=functools.partial(_open_loader, config, facts, rank, world_size),
        validation=validation,
        tokenizer=side_files.tokenizer,
        checkpoints=_checkpoint_writer(config, side_files, start, state, rank),
        snapshot=snapshots.take,
        restore=snapshots.restore,
        metrics=metrics,
        signals=SignalWatch(),
        ballot=Ballot(cpu_group()),
        watchdog=watchdog,
        group=group,
        deadline=None if config.train.max_time is None else begun + config.train.max_time,
    )
    watchdog.start()
    # What is alive now stays alive: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    try:
        # Until here a signal ends the process at once: there is nothing to save. From the barrier on all ranks listen.
        with run.signals.watching(), _stop_without_the_others(run):
            fabric.barrier()
            fit(run)
    finally:
        gc.unfreeze()
        watchdog.stop()
        run.checkpoints.wait()
        metrics.close()


def _check_files(facts: Facts, validation: Mapping[str, ValidationLoader]) -> None:
    for source in [*facts.sources, *(loader.source for loader in validation.values())]:
        source.check_files()


def _hold_folder(config: PretrainConfig, rank: int, held: contextlib.ExitStack) -> None:
    """Let no second run write into the folder, or clear away what this one is about to save; mend what a kill tore.

    Raises:
        CheckpointError: Another program's results are in it, which ours would replace.
        StorageError: Another run is in it, and stays.
    """
    if rank == 0:
        check_nothing_foreign(config)
        held.enter_context(folder_lock(config.out_dir, "train", wait=_HOLDER_GRACE_S))
        with storage_errors(f"write {config.out_dir}"):
            run_folder.bring_back_replaced(config.out_dir)


def _hold_new_folder(config: PretrainConfig, rank: int, held: contextlib.ExitStack) -> None:
    """Likewise, of a folder that was not there when this run looked for a checkpoint to go on from.

    Raises:
        CheckpointError: Another run was there since.
    """
    _hold_folder(config, rank, held)
    if rank == 0 and run_folder.complete_checkpoints(config.out_dir):
        raise CheckpointError(
            f"another run began in {config.out_dir} meanwhile; add --resume=auto to go on with it, or give another "
            "--out_dir"
        )


def _open_folder(config: PretrainConfig, state: TrainState, rank: int, start: Path | None) -> MetricsWriter:
    """Rank 0 leaves the configuration in the run's folder, clears away what does not count, and opens the metrics."""
    settings = config_to_dict(config)
    if rank == 0:
        with storage_errors(f"write {config.out_dir / METRICS_FILENAME}"):
            (config.out_dir / METRICS_FILENAME).touch()  # first: it shows whose folder this is
            starts = earlier_starts(config.out_dir) if start is None else []
        if starts:  # a run that was killed before its first checkpoint began then, not now
            state.begun_at, state.restarts = starts[0], len(starts)
        write_atomic(config.out_dir / run_folder.CONFIG_FILENAME, yaml.safe_dump(settings, sort_keys=False))
        with storage_errors(f"write {config.out_dir}"):
            run_folder.sweep_unfinished(config.out_dir)
            for path in run_folder.set_aside_newer(config.out_dir, start):
                logger.warning("set aside, because the run goes on from before it: %s", path)
    return MetricsWriter(config, settings, state, rank=rank)


@contextlib.contextmanager
def _stop_without_the_others(run: Run) -> Iterator[None]:
    """A rank that a signal ended while it started breaks the collectives of the others, who were asked to stop too."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no type of their own for a rank that is gone
        if not run.signals.arrives_within(_SIGNAL_GRACE_S):
            raise
        name, reason = signal.Signals(run.signals.received).name, str(error).splitlines()[0]
        raise Interrupted(
            f"stopped by {name} when another rank was gone already ({reason}); go on from the last checkpoint with "
            "--resume=auto",
            run.signals.received,
        ) from error


def _starting_point(config: PretrainConfig, group: Any, rank: int, world_size: int) -> Path | None:
    """The verified checkpoint to go on from, or None to begin.

    Raises:
        CheckpointError: The one asked for is damaged, there is none, or the folder holds a run nobody asked to go on
        with.
    """
    if isinstance(config.resume, Path):
        run_folder.verify_checkpoint(config.resume, group, rank, world_size)
        return config.resume
    if config.resume:
        folder = run_folder.newest_whole_checkpoint(config.out_dir, group, rank, world_size)
        if folder is None and config.resume is True:
            raise nothing_to_resume(config)
        if folder is None and rank == 0 and run_folder.complete_checkpoints(config.out_dir):
            logger.warning("%s holds no whole checkpoint: the run begins anew", config.out_dir)
        return folder
    check_no_run(config)
    return None


def _is_finished(
    config: PretrainConfig, start: Path, step: int, plan: RunPlan, group: Any, rank: int, world_size: int
) -> bool:
    """Whether RUN/final is what this run would end in. Call on every rank."""
    final = config.out_dir / run_folder.FINAL_FOLDER
    if plan.total_steps is None or step < plan.total_steps:
        return False
    is_there = (final / MANIFEST_FILENAME).is_file() and run_folder.claimed_step(final) == step
    if not gather_objects(is_there, group)[0]:
        return False
    if start.resolve() == final.resolve():
        return True
    try:  # it is made anew when it is damaged, or not a copy of the checkpoint that it should be one of
        run_folder.verify_checkpoint(final, group, rank, world_size)
    except CheckpointError:
        return False
    return read_manifest(final) == read_manifest(start)


def _checkpoint_writer(
    config: PretrainConfig, side_files: SideFiles, start: Path | None, state: TrainState, rank: int
) -> CheckpointWriter:
    own = start is not None and start.resolve() == run_folder.step_folder(config.out_dir, state.step).resolve()
    return CheckpointWriter(
        config.out_dir, config.checkpoint, side_files.write, cpu_group(), rank, start=state if own else None
    )


def _open_loader(config: PretrainConfig, facts: Facts, rank: int, world_size: int, state: TrainState) -> BlockLoader:
    """Training data from the first sample on that the state has not taken."""
    return BlockLoader(
        open_training_sources(config, facts.block_size, facts.model_config.padded_vocab_size),
        cursor=state.cursor,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        start_sample=state.samples,
        num_workers=config.data.num_workers,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=torch.cuda.is_available(),
    )


def _speed(config: PretrainConfig, facts: Facts, fabric: Any) -> Speed:
    peak = config.compute.peak_flops
    if peak is None and fabric.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(fabric.device))
    full, causal = flops_per_token(facts.model_config, facts.block_size)
    return Speed(num_devices=fabric.world_size, peak_flops=peak, flops_per_token=full, flops_per_token_causal=causal)


def _introduce(config: PretrainConfig, facts: Facts, plan: RunPlan, fabric: Any) -> None:
    parameters = num_parameters(facts.model_config, tie_embeddings=config.train.tie_embeddings)
    logger.info(
        "%s: %s parameters on %d x %s; %s blocks of %d tokens",
        facts.model_config.name or config.model_name or "model", f"{parameters:,}", fabric.world_size,
        fabric.device.type, f"{sum(source.num_blocks for source in facts.sources):,}", plan.block_size,
    )  # fmt: skip
    logger.info(
        "%s steps of %s tokens (%d blocks: %d ranks x %d micro batches x %d), until %s",
        "?" if plan.total_steps is None else f"{plan.total_steps:,}", f"{plan.tokens_per_step:,}",
        config.train.global_batch_size, plan.world_size, plan.accumulation, config.train.micro_batch_size, plan.limit,
    )  # fmt: skip
    for source in facts.sources:
        source.warn_of_unreachable_tokens()
    for note in plan.notes:
        logger.warning("%s", note)
