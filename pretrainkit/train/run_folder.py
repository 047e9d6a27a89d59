"""A run's folder: which checkpoints it holds, which of them count, and how they come and go.

Comes in: RUN/step-XXXXXXXX/ and RUN/final/ as docs/design.md lays them out. Guarantees: a checkpoint is believed when
it verifies; where a run goes on from one, no newer one stays that a later start could take instead: those are set aside
under other names; only files that a manifest of this run names, and unfinished saves of this run, are ever deleted.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrainkit.config import CheckpointConfig
from pretrainkit.errors import CheckpointError
from pretrainkit.storage import fsync_folder, sweep_drafts
from pretrainkit.train.manifest import MANIFEST_FILENAME, read_manifest, verify_files
from pretrainkit.train.parallel import gather_objects, together

logger = logging.getLogger(__name__)

TENSORS_FOLDER = "lit_model.pth"
FINAL_FOLDER = "final"
CONFIG_FILENAME = "config.yaml"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
PARTIAL, REPLACED = ".partial", ".replaced"
_ASIDE = ".aside"


def step_folder(out_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out_dir / f"step-{step:08d}"


def complete_checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoint folders of a run whose save was finished, newest first; `final` before the step it was made from."""
    steps = sorted((path for path in out_dir.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)), reverse=True)
    found = [path for path in steps if (path / MANIFEST_FILENAME).is_file()]
    final = out_dir / FINAL_FOLDER
    if (final / MANIFEST_FILENAME).is_file():
        found.insert(0, final)  # sorting keeps the order of equals
    return sorted(found, key=claimed_step, reverse=True)


def foreign_results(out_dir: Path) -> list[str]:
    """Names in a run folder that a run replaces or removes and that are no whole checkpoint of ours, sorted.

    litgpt, for one, writes `step-00001000` and `final` too, and has the same default folder.
    """
    names = [path.name for path in out_dir.glob("step-*") if _STEP_FOLDER.fullmatch(path.name.partition(".")[0])]
    found = [name for name in (*names, FINAL_FOLDER) if (out_dir / name).is_dir()]
    foreign = [name for name in found if not (out_dir / name / MANIFEST_FILENAME).is_file()]
    if foreign == found and (out_dir / CONFIG_FILENAME).is_file():
        foreign.append(CONFIG_FILENAME)
    return sorted(foreign)


def claimed_step(folder: Path) -> int:
    """The step a checkpoint says it is of; -1 when its manifest is damaged, so that it is tried last."""
    try:
        return read_manifest(folder)[0]
    except CheckpointError:
        match = _STEP_FOLDER.fullmatch(folder.name)
        return int(match[1]) if match else -1


def verify_checkpoint(folder: Path, group: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Read and check every byte of a checkpoint; the ranks share the work. Call on every rank.

    Raises:
        CheckpointError: On every rank, naming the first file that is not what was saved.
    """
    _, files = together(lambda: read_manifest(folder), group)
    wrong = gather_objects(verify_files(folder, files, rank, world_size), group)
    for line in sorted(line for lines in wrong for line in lines):
        raise CheckpointError(f"{folder}: {line}; take another checkpoint")


def newest_whole_checkpoint(
    out_dir: Path,
    group: Any = None,
    rank: int = 0,
    world_size: int = 1,
    *,
    which: Callable[[Path], bool] = lambda _: True,
) -> Path | None:
    """The newest checkpoint of a run that verifies; damaged ones are named and passed over. Call on every rank.

    Args:
        out_dir: The run's folder.
        group: gloo group of all ranks; None with one.
        rank: This process.
        world_size: Processes in all.
        which: Whether a whole checkpoint will do.
    """
    candidates: list[Path] = gather_objects(complete_checkpoints(out_dir) if rank == 0 else [], group)[0]
    for folder in candidates:
        try:
            verify_checkpoint(folder, group, rank, world_size)
        except CheckpointError as error:
            if rank == 0:
                logger.warning("passed over a damaged checkpoint: %s", error)
            continue
        if which(folder):
            return folder
    return None


def set_aside_newer(out_dir: Path, start: Path | None) -> list[Path]:
    """Rename what is newer than the checkpoint a run goes on from: damaged ones, and those of a way it does not go.

    Args:
        out_dir: The run's folder.
        start: Where the run goes on from; None, or a folder elsewhere: nothing here belongs to what it will do.

    Returns:
        The new names, newest first.
    """
    found = complete_checkpoints(out_dir)
    places = [folder.resolve() for folder in found]
    if start is not None and start.resolve() in places:
        found = found[: places.index(start.resolve())]
    return [_set_aside(folder) for folder in found]


def forget_after(out_dir: Path, folder: Path) -> None:
    """Remove the checkpoints of later steps than this one: the run has gone back to it and goes another way."""
    step = claimed_step(folder)
    for later in complete_checkpoints(out_dir):
        if claimed_step(later) <= step:
            continue
        if later.name == FINAL_FOLDER or not _is_readable(later):
            _set_aside(later)
        else:
            _delete_checkpoint(later)


def remove_old(out_dir: Path, config: CheckpointConfig, written: Path) -> None:
    """Delete what need not be kept beside the checkpoint just written, which always stays."""
    if config.keep_last is None:
        return
    others = [path for path in complete_checkpoints(out_dir) if path.name != FINAL_FOLDER and path != written]
    for folder in others[config.keep_last - 1 :]:
        step = int(folder.name.removeprefix("step-"))
        is_ours = _is_readable(folder) and claimed_step(folder) == step
        if is_ours and (config.keep_every is None or step % config.keep_every):
            _delete_checkpoint(folder)


def link_final(folder: Path, final: Path) -> None:
    """Make `final` a copy of a checkpoint, by links; an earlier one is kept under its step's name."""
    _, files = manifest = read_manifest(folder)
    if (final / MANIFEST_FILENAME).is_file():
        if _is_readable(final) and read_manifest(final) == manifest:
            return
        final.rename(_free_name(final.with_name(f"{FINAL_FOLDER}-{max(claimed_step(final), 0):08d}")))
    elif final.exists():
        shutil.rmtree(final)  # an earlier attempt of ours that did not finish
    for name in [*files, MANIFEST_FILENAME]:
        target = final / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(folder / name, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / name, temporary)
        os.replace(temporary, target)
    fsync_folder(final)


def _delete_checkpoint(folder: Path) -> None:
    """Remove the files that a checkpoint's manifest names, the manifest first; anything else in the folder stays."""
    _, files = read_manifest(folder)
    (folder / MANIFEST_FILENAME).unlink()
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for path in (folder / TENSORS_FOLDER, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _set_aside(folder: Path) -> Path:
    return folder.rename(_free_name(folder.with_name(f"{folder.name}{_ASIDE}")))


def _free_name(path: Path) -> Path:
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


def _is_readable(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def bring_back_replaced(out_dir: Path) -> None:
    """Undo a replacement that was interrupted between its two renames; call before a checkpoint is looked for."""
    for path in sorted(out_dir.glob(f"step-*{REPLACED}")):
        replacing = path.with_name(path.name.removesuffix(REPLACED))
        if _STEP_FOLDER.fullmatch(replacing.name) and not replacing.exists():
            path.rename(replacing)


def sweep_unfinished(out_dir: Path) -> None:
    """Remove what saves of this run left when they were interrupted; call before training, on one rank."""
    sweep_drafts(out_dir)
    for suffix in (PARTIAL, REPLACED):
        for path in sorted(out_dir.glob(f"step-*{suffix}")):
            if _STEP_FOLDER.fullmatch(path.name.removesuffix(suffix)):
                shutil.rmtree(path)
