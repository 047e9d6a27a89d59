"""Checkpoints, written beside the training, whole or not there.

Comes in: tensors and a record. Goes out: RUN/step-XXXXXXXX/ and RUN/final/ as docs/design.md lays them out. Guarantees:
`manifest.json` is written last, and only then does the folder get its name, so an interrupted save is no checkpoint; a
save copies the state first and then works in the background; the last checkpoint is never deleted before a newer one is
complete.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrainkit.config import CheckpointConfig
from pretrainkit.errors import CheckpointError, PretrainKitError, StorageError
from pretrainkit.storage import fsync_folder, storage_errors, write_json
from pretrainkit.train.manifest import Files, hash_files, write_manifest
from pretrainkit.train.parallel import gather_objects, together
from pretrainkit.train.run_folder import (
    FINAL_FOLDER,
    PARTIAL,
    REPLACED,
    TENSORS_FOLDER,
    complete_checkpoints,
    forget_after,
    link_final,
    newest_whole_checkpoint,
    remove_old,
    step_folder,
)
from pretrainkit.train.state import STATE_FILENAME, TrainState, read_record

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time, in a thread of its own.

    Args:
        out_dir: The run's folder.
        config: What to keep.
        write_side_files: Puts model configuration and tokenizer files into a folder; called on rank 0.
        group: gloo group for this writer alone; None with one rank.
        rank: This process's.
        start: The state whose checkpoint in this folder the run goes on from; None where it begins, or goes on from
            another folder.
    """

    def __init__(
        self,
        out_dir: Path,
        config: CheckpointConfig,
        write_side_files: Callable[[Path], None],
        group: Any,
        rank: int,
        start: TrainState | None = None,
    ) -> None:
        self.out_dir = out_dir
        self.last_seconds: float | None = None
        self._config = config
        self._write_side_files = write_side_files
        self._group = group
        self._rank = rank
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved = None if start is None else (start.step, start.data_step)

    def save(self, tensors: dict[str, Any], record: dict[str, Any], *, background: bool) -> Path:
        """Save a checkpoint, unless the last one saved is of the same step. Call on every rank.

        Args:
            tensors: {"model": ..., "optimizer": ...}; on return they may change again.
            record: Content of state.json.
            background: Training goes on, also when the save fails; where configured, as soon as the tensors are copied.

        Raises:
            StorageError: `background` is false and the files could not be written.
        """
        from pretrainkit.train.dcp import copy_to_cpu

        self.wait()
        folder = step_folder(self.out_dir, record["state"]["step"])
        if _place(record) == self._saved:
            return folder
        if not background:
            self._write(tensors, record, folder)
        elif self._config.asynchronous:
            arguments = (copy_to_cpu(tensors), record, folder, _current_gpu())
            self._thread = threading.Thread(target=self._try_to_write, args=arguments, daemon=True)
            self._thread.start()
        else:
            self._try_to_write(tensors, record, folder, None)
            self.wait()
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
        partial = folder.with_name(f"{folder.name}{PARTIAL}")
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
            replaced = folder.with_name(f"{folder.name}{REPLACED}")
            if folder.exists():  # the same step, saved once more
                folder.rename(replaced)
            partial.rename(folder)
            fsync_folder(self.out_dir)
            if replaced.exists():
                shutil.rmtree(replaced)
            remove_old(self.out_dir, self._config, folder)

    def with_fewest_skips(self, below: int, world_size: int) -> Path | None:
        """The newest whole checkpoint with no steps skipped shortly before it, or else the fewest. Call on every rank.

        Args:
            below: So many skips are too many.
            world_size: Ranks.
        """
        counts = [_recent_skips(folder) for folder in complete_checkpoints(self.out_dir)] if self._rank == 0 else []
        fewest = gather_objects(min(counts, default=below), self._group)[0]
        if fewest >= below:
            return None
        return newest_whole_checkpoint(
            self.out_dir, self._group, self._rank, world_size, which=lambda folder: _recent_skips(folder) <= fewest
        )

    def forget_after(self, folder: Path) -> None:
        """Let this be the newest checkpoint, after a rewind to it."""
        if self._rank == 0:
            with storage_errors(f"write {self.out_dir}"):
                forget_after(self.out_dir, folder)

    def publish_final(self, folder: Path) -> Path:
        """Make RUN/final out of a checkpoint, by links; an earlier final of another step is kept under its step's name.

        Raises:
            StorageError: The folder cannot be written.
        """
        final = self.out_dir / FINAL_FOLDER
        if self._rank == 0:
            with storage_errors(f"write {final}"):
                link_final(folder, final)
        together(lambda: None, self._group)  # nobody goes on before it is there
        return final


def _recent_skips(folder: Path) -> float:
    try:
        return float(read_record(folder)["state"].recent_skips)
    except CheckpointError:
        return math.inf


def _current_gpu() -> int | None:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _place(record: dict[str, Any]) -> tuple[int, int]:
    """What tells two saves of one run apart: a rewind leads to the same step with other data behind it."""
    return record["state"]["step"], record["state"]["data_step"]
