"""The training loop.

Comes in: a `Run`, everything made and placed by `setup`. Goes out: a trained model in RUN/final, and a row of numbers
per logged step. Guarantees: a step that does not log never waits for the device; step s trains on the same samples and
with the same learning rate whatever happened before; stopping finishes the step and saves.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pretrainkit.errors import Interrupted, TrainingError
from pretrainkit.models.masters import cast_masters
from pretrainkit.stream import BlockLoader
from pretrainkit.train.evaluation import generate, validate
from pretrainkit.train.metrics import memory_gb, train_line
from pretrainkit.train.optimizer import gradient_norm, take_step
from pretrainkit.train.parallel import gather_objects, gradient_sync
from pretrainkit.train.run import Run
from pretrainkit.train.schedule import learning_rate
from pretrainkit.train.signals import TIME_IS_UP
from pretrainkit.train.state import DIGEST_MASK

logger = logging.getLogger(__name__)

_CLOSING_S = 0.5  # publishing RUN/final, closing the loggers


def fit(run: Run) -> None:
    """Train to the end of the plan, then publish RUN/final.

    Raises:
        Interrupted: A signal asked to stop; everything is saved.
        TrainingError: Too many steps had to be skipped.
    """
    state, config = run.state, run.config
    if config.eval.initial_validation and state.step == 0:
        _validate(run)
    loader = run.open_loader(state)
    stop = 0
    while not stop and not _is_last(run):
        run.watchdog.alive(state.step, "computing")
        _step(run, loader)
        is_last = _is_last(run)
        most_skips = _log(run, loader) if _due(state.step, config.train.log_interval) or is_last else 0
        with run.window.paused():
            if most_skips >= config.guard.max_skips:
                loader.close()
                loader = _rewind(run, most_skips)
                continue
            if _due(state.step, config.eval.interval) and not is_last:
                _validate(run)
            if _due(state.step, config.train.save_interval) and not is_last:
                _save(run, loader, background=True)
            stop = run.ballot.cast(_wish(run))
    with run.window.paused():
        run.watchdog.alive(state.step, "saving")
        folder = _save(run, loader, background=False)
        loader.close()
    _finish(run, folder, stop)


def _step(run: Run, loader: BlockLoader) -> None:
    """One optimizer step: accumulate micro batches, judge, clip, step."""
    state, plan, window = run.state, run.plan, run.window
    targets = torch.zeros((), dtype=torch.float64, device=run.fabric.device)
    for micro_batch in range(plan.accumulation):
        run.watchdog.alive(state.step, "waiting for data")
        batch = window.next_batch(loader)
        run.watchdog.alive(state.step, "computing")
        gradient_sync(run.bare_model, micro_batch == plan.accumulation - 1)
        output = run.model(batch)
        run.fabric.backward(output.loss)  # a sum over targets, which the optimizer's step divides by their number
        window.add_batch(output)
        targets += output.num_targets
    if run.config.data.document_mask and plan.world_size > 1:  # else every rank has the same number
        dist.all_reduce(targets)
        targets /= plan.world_size  # the mean, for FSDP averages gradients over ranks
    scale = targets.float().clamp_min(1.0)

    norm = gradient_norm(run.optimizers) / scale
    skip = run.guard.judge(norm, state.data_step)
    max_norm = run.config.train.max_norm
    clip = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    state.step += 1
    state.data_step += 1
    state.tokens += plan.tokens_per_step
    state.samples += run.config.train.global_batch_size
    lr = learning_rate(run.course, state.tokens)
    take_step(run.optimizers, learning_rate=lr, grad_scale=scale / clip, skip=skip)
    cast_masters(run.bare_model)
    window.add_step(norm, skip, lr)


def _log(run: Run, loader: BlockLoader) -> int:
    """Write one row and one line, the only host synchronisation of a logged step, and return the most recent skips."""
    state, plan = run.state, run.plan
    numbers = run.window.read(run.guard.take_most_skips())
    most_skips = int(numbers.pop("most_skips"))
    _fold_digest(run, loader)
    row = numbers | run.speed.of(plan.tokens_per_step / numbers["step_s"])
    row |= {"memory_gb": memory_gb(), "epoch": state.samples / loader.num_blocks, "goodput": state.goodput}
    ends = [] if plan.total_steps is None else [(plan.total_steps - state.step) * numbers["step_s"]]
    ends += [] if run.deadline is None else [max(0.0, run.deadline - time.monotonic())]
    if ends:
        row["remaining_s"] = min(ends)
    sources = loader.tokens_per_source() if len(loader.sources) > 1 else None
    run.metrics.write("train", state, **row, digest=f"{state.digest:016x}", tokens_per_source=sources)
    if run.fabric.is_global_zero:
        logger.info(train_line({**row, "step": state.step, "tokens": state.tokens}, plan.total_steps))
        if row["skipped"]:
            logger.warning(
                "step %d: %d step(s) skipped, gradient norm %.3g; %d of the last %d",
                state.step, row["skipped"], row["grad_norm"], most_skips, run.config.guard.window,
            )  # fmt: skip
    return most_skips


def _fold_digest(run: Run, loader: BlockLoader) -> None:
    """Bring the state's digest of all tokens so far up to date; it is the same on any number of ranks."""
    parts = gather_objects(loader.digest(), run.group)
    run.state.digest = (run.state.digest + sum(parts)) & DIGEST_MASK


def _validate(run: Run) -> None:
    """Validation loss, and samples when there are prompts."""
    if not run.validation:
        return
    state = run.state
    start = time.perf_counter()
    run.watchdog.alive(state.step, "validating")
    values = validate(
        run.model, run.validation, run.fabric.device, lambda: run.watchdog.alive(state.step, "validating")
    )
    samples = None
    if run.config.eval.prompts and run.tokenizer is not None:
        samples = generate(
            run.model, run.tokenizer, run.config.eval.prompts, max_new_tokens=run.config.eval.max_new_tokens,
            block_size=run.plan.block_size, device=run.fabric.device,
        )  # fmt: skip
    state.validation_seconds = time.perf_counter() - start
    run.metrics.write("validation", state, **values, samples=samples, validation_s=state.validation_seconds)
    if run.fabric.is_global_zero:
        bits = values.get("val_bits_per_byte")
        logger.info(
            "validation at step %d: loss %.4f, perplexity %.2f%s",
            state.step, values["val_loss"], values["val_perplexity"], f", {bits:.4f} bits per byte" if bits else "",
        )  # fmt: skip
        for text in (samples or {}).values():
            logger.info("  %r", text)


def _save(run: Run, loader: BlockLoader, *, background: bool) -> Path:
    """Save the state as it stands."""
    state = run.state
    run.watchdog.alive(state.step, "saving")
    _fold_digest(run, loader)
    run.checkpoints.wait()
    state.recent_skips = run.guard.recent_skips()
    state.save_seconds = run.checkpoints.last_seconds or state.save_seconds
    start = time.perf_counter()
    folder = run.checkpoints.save(*run.snapshot(), background=background)
    run.metrics.write("save", state, path=folder.name, blocked_s=time.perf_counter() - start)
    return folder


def _rewind(run: Run, most_skips: int) -> BlockLoader:
    """Go back to the last good checkpoint, and past the data that did harm."""
    state = run.state
    run.checkpoints.wait()
    reason = f"{most_skips} of {run.config.guard.window} steps were skipped before step {state.step}"
    folder = run.checkpoints.with_fewest_skips(run.config.guard.max_skips, run.plan.world_size)
    if folder is None:
        raise TrainingError(
            f"{reason}, and there is no checkpoint with fewer skips to go back to; lower optimizer.init_args.lr or "
            "look at the data"
        )
    if state.rewinds >= run.config.guard.max_rewinds:
        raise TrainingError(
            f"{reason}, after {state.rewinds} rewinds; lower optimizer.init_args.lr or look at the data"
        )
    before = run.restore(folder)["state"]
    # Else the newest checkpoint to resume from would be one of before, until as many steps are done again.
    run.checkpoints.forget_after(folder)
    run.guard.forget()
    state.step, state.tokens, state.train_seconds = before.step, before.tokens, before.train_seconds
    state.rewinds += 1
    run.replan()
    run.metrics.write("rewind", state, path=folder.name, samples=state.samples)
    if run.fabric.is_global_zero:
        logger.warning("%s: back to %s, past the data seen since", reason, folder)
    return run.open_loader(state)


def _is_last(run: Run) -> bool:
    total_steps = run.plan.total_steps
    return total_steps is not None and run.state.step >= total_steps


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _wish(run: Run) -> int:
    """This rank's vote on stopping after this step."""
    if run.signals.received:
        return run.signals.received
    if run.deadline is None:
        return 0
    # One more step, the one in which the vote arrives, and the save must fit; a save takes about as long as the last.
    needed = 2 * run.window.seconds_per_step + 1.5 * run.save_seconds + _CLOSING_S
    if run.config.eval.final_validation:
        needed += run.state.validation_seconds
    return TIME_IS_UP if time.monotonic() + needed > run.deadline else 0


def _finish(run: Run, folder: Path, stop: int) -> None:
    state = run.state
    run.ballot.result()  # the vote still under way
    if stop > TIME_IS_UP:
        run.metrics.write("stop", state, signal=stop)
        name = signal.Signals(stop).name
        raise Interrupted(f"stopped by {name} after step {state.step}; saved, go on with --resume=auto", stop)
    if not run.guard.num_taken:
        raise TrainingError(
            f"not one of {state.step} steps was taken, for no gradient was finite; lower optimizer.init_args.lr, or "
            "look at the first weights and at the data"
        )
    if run.config.eval.final_validation:
        _validate(run)
    run.watchdog.alive(state.step, "finishing")
    final = run.checkpoints.publish_final(folder)
    run.metrics.write("end", state, goodput=state.goodput, train_seconds=state.train_seconds)
    if run.fabric.is_global_zero:
        why = "time is up" if stop else "done"
        logger.info("%s after step %d, %s tokens: %s", why, state.step, f"{state.tokens:,}", final)
