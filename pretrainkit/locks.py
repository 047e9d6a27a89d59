"""Keeping two processes out of one folder.

Guarantee: the operating system lets go of a lock when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pretrainkit.errors import StorageError
from pretrainkit.storage import storage_errors

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def folder_lock(folder: str | Path, doing: str, *, shared: bool = False, wait: bool | float = False) -> Iterator[None]:
    """Hold a local folder; the operating system lets go of it when the process dies, however it dies.

    Args:
        folder: Made when missing.
        doing: What the caller does, for the message: "merge", "optimize".
        shared: Let other shared holders in, as the ranks of one job; an exclusive holder still keeps everybody out.
        wait: Wait for the present holder instead of refusing, or so many seconds before refusing.

    Raises:
        StorageError: Another living process holds the folder.
    """
    folder = Path(folder)
    with storage_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            raise StorageError(
                f"{folder} is in use by another process ({holder}); wait for it or {doing} into another folder"
            ) from error
        with contextlib.suppress(OSError):  # who holds it is a courtesy: on a full disk it is left out
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        try:
            yield
        finally:
            if not shared:  # a finished folder holds the same bytes whoever made it
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, mode: int, wait: bool | float) -> None:
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, mode if wait is True else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # as of Lustre mounted without flock
                raise
            logger.warning("no locks on this file system (%s): nothing keeps a second job out", error.strerror)
            return
        else:
            return
