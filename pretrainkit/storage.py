"""Files, local or remote: listing, atomic writes, checksums.

Comes in: a local path or a URL (`s3://`, `gs://`, `hf://`, anything fsspec knows). Guarantees: listings are sorted; a
reader sees a file whole or not at all; what a power cut can take back is never reported as done (file and folder are
fsynced).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrainkit.errors import ConfigError, DatasetError, StorageError
from pretrainkit.remote import RetryingFile, filesystem, patiently
from pretrainkit.values import at_home

_CHECKSUM_READ_BYTES = 1 << 20


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL that needs fsspec."""
    return "://" in str(path)


def given_path(path: str | Path, flag: str) -> str:
    """A path or URL as a user gave it, `~` and file:// resolved, which no shell does in --flag=~/folder.

    Raises:
        ConfigError: It is empty, and would mean the working folder.
        StorageError: It is longer than file systems take.
    """
    if not str(path):
        raise ConfigError(f"{flag} is empty; give a folder or URL (is a shell variable unset?)")
    return at_home(flag, str(path).removeprefix("file://"))


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
        errno.ENOENT: "a folder on the way is gone or cannot be made; give another path",
        errno.EFBIG: "a file would be larger than the file system or ulimit -f allows; raise it or lower chunk_bytes",
        errno.EIO: "the device reports an error; give a folder on another one",
        errno.ENAMETOOLONG: "a name in the path is too long; give another path",
        errno.EEXIST: "a file lies where a folder belongs; give another path",
        errno.EISDIR: "a folder lies where the file belongs; move it away",
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
        fs, inner = filesystem(str(path))
        # Object stores publish an object when its upload completes: a PUT is atomic by itself.
        try:
            patiently(str(path), fs, lambda: fs.pipe_file(inner, payload))
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {path}: {error}; make the bucket, or give another URL") from error
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


def join(base: str | Path, *parts: str) -> str:
    """A path below a local folder or a URL."""
    return "/".join([str(base).rstrip("/") or "/", *parts])


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there, local or remote.

    Raises:
        UnreachableError: That cannot be found out.
    """
    if not is_remote(path):
        return Path(path).exists()
    fs, inner = filesystem(str(path))
    try:
        patiently(str(path), fs, lambda: fs.info(inner))  # some file systems' exists() takes a failure for a no
    except FileNotFoundError:
        return False
    return True


def read_bytes(path: str | Path) -> bytes:
    """A whole small file, local or remote.

    Raises:
        FileNotFoundError: There is no such file.
        UnreachableError: It cannot be had now.
    """
    if is_remote(path):
        fs, inner = filesystem(str(path))
        return patiently(str(path), fs, lambda: bytes(fs.cat_file(inner)))
    return Path(path).read_bytes()


def read_description(path: Path) -> str:
    """A small local text file that others may have put there: never a FIFO that makes us wait.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: Something else than a file lies there, or it is not text.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read().decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not text; it is damaged, make it again") from error
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
    raise DatasetError(f"{path} is not a regular file; put the file itself there, or make it again")


def remove(path: str | Path) -> None:
    """Delete one file, local or remote, if it is there."""
    if is_remote(path):
        fs, inner = filesystem(str(path))
        with contextlib.suppress(FileNotFoundError):
            patiently(str(path), fs, lambda: fs.rm_file(inner))
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
        return _list_remote(str(root), suffixes)
    files: list[ListedFile] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise StorageError(f"cannot list {error.filename}: {error.strerror}") from error

    suffixes = tuple(suffix.lower() for suffix in suffixes)
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # of two ways to one folder, the first by name is taken, on every machine
        files += [_local_file(Path(root), Path(folder) / name) for name in names if name.lower().endswith(suffixes)]
    return sorted(files, key=lambda file: file.name)


def _list_remote(root: str, suffixes: tuple[str, ...]) -> list[ListedFile]:
    fs, inner = filesystem(root)
    inner = inner.rstrip("/")

    def find() -> Any:
        fs.invalidate_cache()  # a listing that broke off half-way may be there
        return fs.find(inner, detail=True)

    try:
        found = patiently(root, fs, find)
    except FileNotFoundError as error:
        raise StorageError(
            f"{root} does not exist, or is not shown to you ({error}); if it is private, give credentials (hub: "
            "HF_TOKEN)"
        ) from error
    except NotImplementedError as error:
        raise StorageError(f"{root} cannot be listed ({error}); on the hub, give hf://datasets/OWNER/NAME") from error
    if inner in found and found[inner].get("type", "file") == "file":  # the hub's find says nothing about one file
        raise StorageError(f"{root} is a file; give its folder, {root.rstrip('/').rpartition('/')[0]}")
    scheme = root.split("://", maxsplit=1)[0]
    return sorted(
        (
            ListedFile(name=path.removeprefix(inner + "/"), path=f"{scheme}://{path}", size=int(info["size"]))
            for path, info in found.items()
            # A store may hold an empty object for a folder.
            if path.lower().endswith(suffixes) and info["type"] == "file" and not path.endswith("/")
        ),
        key=lambda file: file.name,
    )


def _local_file(root: Path, path: Path) -> ListedFile:
    name = path.relative_to(root).as_posix()
    try:
        str(path).encode()
    except UnicodeEncodeError:  # neither a plan nor pyarrow can name it
        name = os.fsencode(name).decode(errors="backslashreplace")
        return ListedFile(name=name, path=str(path), size=0, problem="its name is not UTF-8; rename it")
    try:
        status = path.stat()
    except OSError as error:
        why = "a link to nothing" if path.is_symlink() else str(error.strerror)
        return ListedFile(name=name, path=str(path), size=0, problem=why)
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return ListedFile(name=name, path=str(path), size=status.st_size, problem=problem)


def open_input(path: str, *, read_ahead: int = 0) -> Any:
    """A file to read by ranges: a path opened by pyarrow, or a remote file that retries.

    Args:
        path: Path or URL.
        read_ahead: Bytes that a remote file fetches at least, for who reads it from one end to the other.
    """
    import pyarrow as pa

    if not is_remote(path):
        if stat.S_ISFIFO(os.stat(path).st_mode):  # since the listing; to open it would take for ever
            raise StorageError("not a regular file")
        return pa.OSFile(path, mode="r")
    file = RetryingFile(path)
    return pa.PythonFile(io.BufferedReader(file, read_ahead) if read_ahead else file, mode="r")


def publish(temporary: str | Path, target: str | Path) -> None:
    """Move a finished, fsynced local file to its final name: a rename where possible, else an upload.

    Raises:
        StorageError: The target cannot be written.
    """
    if is_remote(target):
        fs, inner = filesystem(str(target))
        # One object: visible whole, when the upload has completed.
        patiently(str(target), fs, lambda: fs.put_file(str(temporary), inner))
        os.unlink(temporary)
        return
    with storage_errors(f"write {target}"):
        os.replace(temporary, target)
