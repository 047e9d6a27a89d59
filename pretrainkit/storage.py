"""Files, local or remote: listing, atomic writes, checksums, locks.

Comes in: a local path or a URL (`s3://`, `gs://`, `hf://`, anything fsspec knows). Guarantees: listings are sorted; a
reader sees a file whole or not at all; what a power cut can take back is never reported as done (file and folder are
fsynced).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrainkit.errors import StorageError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_CHECKSUM_READ_BYTES = 1 << 20
# s3fs and huggingface_hub retry by themselves too; these cover what outlasts them: about a minute in all.
_RETRY_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32)


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
        where = str(error.filename or "")
        where = where.rpartition("/.")[0] if "/." in where else where  # drafts and stages tell a user nothing
        at = f" ({where})" if where not in doing else ""
        raise StorageError(f"cannot {doing}{at}: {hints[error.errno]}") from error


def fsync_folder(folder: str | Path) -> None:
    """Make the names in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole small file so that readers see the old content, or the new, never a part.

    A local file that holds these very bytes is left alone: a finished job run again needs no space.

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
        if path.is_file() and path.stat().st_size == len(payload) and path.read_bytes() == payload:
            fsync_folder(path.parent)
            return
        prefix = f".{path.name}.{socket.gethostname()}-{process_mark(os.getpid())}-"
        descriptor, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
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


def process_mark(pid: int) -> str | None:
    """`pid-start` of a living process of this machine, None for a dead one.

    The time it started tells it from a later process that was given the same number.
    """
    try:
        # Source: proc(5), stat: the state follows the name in brackets (Z, X: dead), the start comes 19 later.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{pid}-{fields[19]}"


def sweep_drafts(folder: str | Path) -> None:
    """Remove what `write_atomic` left in a local folder when its process was killed; nothing of living processes.

    Another machine's drafts are left alone: whether their processes live cannot be seen from here.
    """
    draft = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(?P<mark>(?P<pid>\d+)-\d+)-\w{{8}}\.tmp", re.ASCII)
    with contextlib.suppress(FileNotFoundError):  # no such folder; or another rank sweeps here too
        for name in sorted(os.listdir(folder)):
            found = draft.fullmatch(name)
            if found is not None and process_mark(int(found["pid"])) != found["mark"]:
                os.unlink(os.path.join(folder, name))


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
def folder_lock(folder: str | Path, doing: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a local folder; the operating system lets go of it when the process dies, however it dies.

    Args:
        folder: Made when missing.
        doing: What the caller does, for the message: "merge", "optimize".
        shared: Let other shared holders in, as the ranks of one job; an exclusive holder still keeps everybody out.
        wait: Wait for the present holder instead of refusing.

    Raises:
        StorageError: Another living process holds the folder.
    """
    folder = Path(folder)
    with storage_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(descriptor, mode)
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


def join(base: str | Path, *parts: str) -> str:
    """A path below a local folder or a URL."""
    return "/".join([str(base).rstrip("/") or "/", *parts])


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system for a URL and the path in it.

    Raises:
        StorageError: Its package is not installed, or it cannot be reached.
    """
    import fsspec

    try:
        # A process that writes needs to see what it wrote a moment ago.
        options = {"use_listings_cache": False} if url.startswith("s3://") else {}
        fs, path = fsspec.core.url_to_fs(url, **options)
        return fs, path
    except (ImportError, ValueError) as error:
        raise StorageError(f"{url}: {error}; pip install 'pretrainkit[remote]' brings s3:// and hf://") from error


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there, local or remote."""
    if is_remote(path):
        fs, inner = filesystem(str(path))
        return bool(fs.exists(inner))
    return Path(path).exists()


def read_bytes(path: str | Path) -> bytes:
    """A whole small file, local or remote.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if is_remote(path):
        fs, inner = filesystem(str(path))
        return bytes(fs.cat_file(inner))
    return Path(path).read_bytes()


def remove(path: str | Path) -> None:
    """Delete one file, local or remote, if it is there."""
    if is_remote(path):
        fs, inner = filesystem(str(path))
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(inner)
        return
    Path(path).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """One file found below a folder."""

    name: str
    """Path relative to the folder, with forward slashes."""
    path: str
    """Where to open it."""
    size: int
    """Bytes."""
    problem: str | None = None
    """Why it cannot be read at all (a dangling link, a FIFO), or None."""


def list_files(root: str | Path, suffixes: tuple[str, ...]) -> list[ListedFile]:
    """Every file below `root` whose name ends in one of `suffixes`, sorted by name; links to folders are followed.

    Raises:
        StorageError: A folder cannot be listed.
    """
    if is_remote(root):
        fs, inner = filesystem(str(root))
        scheme = str(root).split("://", maxsplit=1)[0]
        found = fs.find(inner, detail=True)
        prefix = inner.rstrip("/") + "/"
        return sorted(
            (
                ListedFile(name=path.removeprefix(prefix), path=f"{scheme}://{path}", size=int(info["size"]))
                for path, info in found.items()
                if path.endswith(suffixes) and info["type"] == "file"
            ),
            key=lambda file: file.name,
        )
    files: list[ListedFile] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise StorageError(f"cannot list {error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        files += [_local_file(Path(root), Path(folder) / name) for name in names if name.endswith(suffixes)]
    return sorted(files, key=lambda file: file.name)


def _local_file(root: Path, path: Path) -> ListedFile:
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError as error:
        why = "a link to nothing" if path.is_symlink() else str(error.strerror)
        return ListedFile(name=name, path=str(path), size=0, problem=why)
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return ListedFile(name=name, path=str(path), size=status.st_size, problem=problem)


class RetryingFile(io.RawIOBase):
    """A remote file opened for reading that survives dropped connections.

    Each read is repeated with growing pauses; a file that changed its size in between is refused, because parts of two
    versions would make one wrong text.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._fs, self._path = filesystem(url)
        self._url = url
        self._position = 0
        self.size = self._retry(lambda: int(self._fs.info(self._path)["size"]))

    def readable(self) -> bool:  # noqa: D102 - as in io
        return True

    def seekable(self) -> bool:  # noqa: D102 - as in io
        return True

    def tell(self) -> int:  # noqa: D102 - as in io
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102 - as in io
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: D102 - as in io
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:  # noqa: D102 - as in io
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        if stop <= self._position:
            return b""
        data = self._retry(lambda: bytes(self._fs.cat_file(self._path, start=self._position, end=stop)))
        if len(data) != stop - self._position:
            raise StorageError(f"{self._url} gave {len(data)} bytes where {stop - self._position} were due; it changed")
        self._position = stop
        return data

    def _retry(self, action: Callable[[], _T]) -> _T:
        for pause_s in _RETRY_PAUSES_S:
            try:
                return action()
            except (FileNotFoundError, PermissionError):
                raise
            except (OSError, TimeoutError) as error:
                logger.warning("%s: %s; trying again in %s s", self._url, error, pause_s)
                time.sleep(pause_s)
        return action()


def open_input(path: str) -> Any:
    """A file to read by ranges: a path opened by pyarrow, or a remote file that retries."""
    import pyarrow as pa

    if is_remote(path):
        return pa.PythonFile(RetryingFile(path), mode="r")
    return pa.OSFile(path, mode="r")


def publish(temporary: str | Path, target: str | Path) -> None:
    """Move a finished, fsynced local file to its final name: a rename where possible, else an upload.

    Raises:
        StorageError: The target cannot be written.
    """
    if is_remote(target):
        fs, inner = filesystem(str(target))
        fs.put_file(str(temporary), inner)  # one object: visible whole, when the upload has completed
        os.unlink(temporary)
        return
    with storage_errors(f"write {target}"):
        os.replace(temporary, target)
