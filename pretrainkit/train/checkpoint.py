"""Checkpoints: written beside the training, whole or not there, verified before they are believed.

Comes in: tensors and a record. Goes out: RUN/step-XXXXXXXX/ and RUN/final/ as docs/design.md lays them out. Guarantees:
`manifest.json` is written last, and only then does the folder get its name, so an interrupted save is no checkpoint; a
save copies the state first and then works in the background; only files that a manifest of this run names, and
unfinished saves of this run, are ever deleted; the last checkpoint is never deleted before a newer one is complete.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrainkit.config import CheckpointConfig
from pretrainkit.errors import CheckpointError, PretrainKitError, StorageError
from pretrainkit.storage import fsync_folder, storage_errors, write_json
from pretrainkit.train.manifest import MANIFEST_FILENAME, Files, hash_files, read_manifest, verify_files, write_manifest
from pretrainkit.train.parallel import gather_objects, together
from pretrainkit.train.state import STATE_FILENAME

logger = logging.getLogger(__name__)

TENSORS_FOLDER = "lit_model.pth"
FINAL_FOLDER = "final"
CONFIG_FILENAME = "config.yaml"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_PARTIAL, _REPLACED = ".partial", ".replaced"


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
    return sorted(found, key=_claimed_step, reverse=True)


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


def _claimed_step(folder: Path) -> int:
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


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time, in a thread of its own.

    Args:
        out_dir: The run's folder.
        config: What to keep.
        write_side_files: Puts model configuration and tokenizer files into a folder; called on rank 0.
        group: gloo group for this writer alone; None with one rank.
        rank: This process's.
    """

    def __init__(
        self, out_dir: Path, config: CheckpointConfig, write_side_files: Callable[[Path], None], group: Any, rank: int
    ) -> None:
        self.out_dir = out_dir
        self.last_seconds: float | None = None
        self._config = config
        self._write_side_files = write_side_files
        self._group = group
        self._rank = rank
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: tuple[int, int] | None = None

    def save(self, tensors: dict[str, Any], record: dict[str, Any], *, background: bool) -> Path:
        """Save a checkpoint, unless the last one saved is of the same step. Call on every rank.

        Args:
            tensors: {"model": ..., "optimizer": ...}; on return they may change again.
            record: Content of state.json.
            background: Return as soon as the tensors are copied.

        Raises:
            StorageError: `background` is false and the files could not be written.
        """
        from pretrainkit.train.dcp import copy_to_cpu

        self.wait()
        folder = step_folder(self.out_dir, record["state"]["step"])
        if _place(record) == self._saved:
            return folder
        if background and self._config.asynchronous:
            arguments = (copy_to_cpu(tensors), record, folder, _current_gpu())
            self._thread = threading.Thread(target=self._try_to_write, args=arguments, daemon=True)
            self._thread.start()
        else:
            self._write(tensors, record, folder)
        return folder

    def wait(self) -> None:
        """Let the save under way finish; one that failed is reported and training goes on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and self._rank == 0:
            logger.warning("a checkpoint could not be saved: %s; training goes on", self._error)
        self._error = None

    def _try_to_write(self, tensors: dict[str, Any], record: dict[str, Any], folder: Path, gpu: int | None) -> None:
        try:
            if gpu is not None:
                import torch

                # A new thread is on GPU 0, where DCP, asking for its stream, would take memory for every rank.
                torch.cuda.set_device(gpu)
            self._write(tensors, record, folder)
        except Exception as error:  # noqa: BLE001 - reported by wait(); a thread has nobody to raise to
            self._error = error

    def _write(self, tensors: dict[str, Any], record: dict[str, Any], folder: Path) -> None:
        start = time.perf_counter()
        partial = folder.with_name(f"{folder.name}{_PARTIAL}")
        try:
            together(lambda: self._prepare(partial, record), self._group)
            self._write_tensors(tensors, partial)
            together(lambda: self._publish(partial, folder, record["state"]["step"]), self._group)
        except PretrainKitError:  # on every rank: nobody writes any more
            if self._rank == 0:  # half a checkpoint would keep a full disk full
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.last_seconds = time.perf_counter() - start
        self._saved = _place(record)

    def _write_tensors(self, tensors: dict[str, Any], partial: Path) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        from pretrainkit.train.dcp import write_tensors

        try:
            write_tensors(tensors, partial / TENSORS_FOLDER, self._group)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            # What PyTorch's zip writer says when the system took less than it was given, which a full disk does.
            if "unexpected pos" in str(reason):
                reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if isinstance(reason, OSError):
                with storage_errors(f"write {partial}"):
                    raise reason from error
            raise StorageError(f"{partial} cannot be written: {reason}") from error

    def _prepare(self, partial: Path, record: dict[str, Any]) -> None:
        import torch

        if self._rank != 0:
            return
        with storage_errors(f"write {partial}"):
            if partial.exists():
                shutil.rmtree(partial)  # a save of ours that did not finish
            (partial / TENSORS_FOLDER).mkdir(parents=True)
            self._write_side_files(partial)
            write_json(partial / STATE_FILENAME, record)
            # Lightning's tools know a sharded checkpoint by this file. Source: lightning fabric/utilities/load.py.
            torch.save({"step": record["state"]["step"]}, partial / TENSORS_FOLDER / "meta.pt")

    def _publish(self, partial: Path, folder: Path, step: int) -> None:
        """Hash what this rank wrote; rank 0 adds the rest, writes the manifest, and removes what is too old."""
        own = [path.name for path in (partial / TENSORS_FOLDER).glob(f"__{self._rank}_*.distcp")]
        with storage_errors(f"write {folder}"):
            hashed = hash_files(partial, [f"{TENSORS_FOLDER}/{name}" for name in own])
        gathered = gather_objects(hashed, self._group)
        if self._rank != 0:
            return
        files: Files = {name: entry for part in gathered for name, entry in part.items()}
        with storage_errors(f"write {folder}"):
            present = [path.relative_to(partial).as_posix() for path in sorted(partial.rglob("*")) if path.is_file()]
            files |= hash_files(partial, [name for name in present if name not in files])
            fsync_folder(partial / TENSORS_FOLDER)
            write_manifest(partial, step, files)
            replaced = folder.with_name(f"{folder.name}{_REPLACED}")
            if folder.exists():  # of this step before a rewind, or a damaged one
                folder.rename(replaced)
            partial.rename(folder)
            fsync_folder(self.out_dir)
            if replaced.exists():
                shutil.rmtree(replaced)
            self._remove_old()

    def forget_after(self, folder: Path) -> None:
        """Remove the checkpoints of later steps than this one: the run has gone back to it and goes another way."""
        if self._rank != 0:
            return
        step = _claimed_step(folder)
        for later in complete_checkpoints(self.out_dir):
            if later.name != FINAL_FOLDER and _claimed_step(later) > step:
                _delete_checkpoint(later)

    def _remove_old(self) -> None:
        if self._config.keep_last is None:
            return
        complete = [path for path in complete_checkpoints(self.out_dir) if path.name != FINAL_FOLDER]
        for folder in complete[self._config.keep_last :]:
            step = int(folder.name.removeprefix("step-"))
            if (self._config.keep_every is None or step % self._config.keep_every) and _claimed_step(folder) == step:
                _delete_checkpoint(folder)

    def publish_final(self, folder: Path) -> Path:
        """Make RUN/final out of a checkpoint, by links; an earlier final of another step is kept under its step's name.

        Raises:
            StorageError: The folder cannot be written.
        """
        final = self.out_dir / FINAL_FOLDER
        if self._rank == 0:
            with storage_errors(f"write {final}"):
                _link_final(folder, final)
        together(lambda: None, self._group)  # nobody goes on before it is there
        return final


def _current_gpu() -> int | None:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _place(record: dict[str, Any]) -> tuple[int, int]:
    """What tells two saves of one run apart: a rewind leads to the same step with other data behind it."""
    return record["state"]["step"], record["state"]["data_step"]


def _link_final(folder: Path, final: Path) -> None:
    step, files = read_manifest(folder)
    if (final / MANIFEST_FILENAME).is_file():
        before = _claimed_step(final)
        if before == step:
            return
        final.rename(final.with_name(f"{FINAL_FOLDER}-{before:08d}"))
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


def sweep_unfinished(out_dir: Path) -> None:
    """Remove saves of this run that were interrupted; call before training, on one rank."""
    for suffix in (_PARTIAL, _REPLACED):
        for path in sorted(out_dir.glob(f"step-*{suffix}")):
            if _STEP_FOLDER.fullmatch(path.name.removesuffix(suffix)):
                shutil.rmtree(path)
