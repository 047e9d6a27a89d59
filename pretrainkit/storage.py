"""Files, local or remote: listing, atomic writes, checksums, locks.

Comes in: a local path or a URL (`s3://`, `gs://`, `hf://`, anything fsspec knows). Guarantees: listings are sorted; a
reader sees a file whole or not at all; what a power cut can take back is never reported as done (file and folder are
fsynced).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrainkit.errors import StorageError

_CHECKSUM_READ_BYTES = 1 << 20


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL that needs fsspec."""
    return "://" in str(path)


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into one clear line.

    Raises:
        StorageError: A full disk, missing permission, a read-only file system and the like, with the path.
    """
    hints = {
        errno.ENOSPC: "the disk is full; free space and run the same command again, finished work is kept",
        errno.EDQUOT: "the disk quota is used up; free space and run the same command again, finished work is kept",
        errno.EROFS: "the file system is read-only; give a folder that can be written",
        errno.EACCES: "no permission; give a folder that can be written",
        errno.EPERM: "no permission; give a folder that can be written",
        errno.ENOTDIR: "a part of the path is a file, not a folder; give another path",
        errno.EMFILE: "too many open files; raise the limit with ulimit -n",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in hints:
            raise
        raise StorageError(f"cannot {doing}: {error.filename or ''} {hints[error.errno]}".replace("  ", " ")) from error


def fsync_folder(folder: str | Path) -> None:
    """Make the names in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole small file so that readers see the old content, or the new, never a part.

    Raises:
        StorageError: The folder cannot be written (full, read-only, no permission).
    """
    payload = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        import fsspec

        # Object stores publish an object when its upload completes: a PUT is atomic by itself.
        with fsspec.open(str(path), "wb") as file:
            file.write(payload)
        return
    path = Path(path)
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        fsync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of a value as indented JSON with sorted keys."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _umask() -> int:
    # The only way to read the umask without changing it, and safe with threads. Source: proc(5), field Umask.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def checksum(path: str | Path) -> str:
    """XXH3-128 of a local file's bytes as 32 hexadecimal digits; finds damage, not malice."""
    import xxhash

    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHECKSUM_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@contextlib.contextmanager
def folder_lock(folder: str | Path, doing: str) -> Iterator[None]:
    """Hold a local folder for one process; the operating system lets go of it when the process dies, however it dies.

    Raises:
        StorageError: Another living process holds the folder.
    """
    folder = Path(folder)
    with storage_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            raise StorageError(
                f"{folder} is in use by another process ({holder}); wait for it or {doing} into another folder"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
