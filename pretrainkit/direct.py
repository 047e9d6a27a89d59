"""Large new files, written past the page cache.

Comes in: buffers. Goes out: a synced file of their bytes. Guarantee: the same file on every file system. Where the
system can, the bytes go to the device without being copied into the kernel's memory: that copy, and the memory it
needs, would cost as much CPU time as everything else that is done to a token after it was encoded.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Source: open(2), O_DIRECT: address, length and place in the file are to be multiples of the device's block, which is
# a page at most.
_BLOCK_BYTES = 4096
_BUFFER_BYTES = 1 << 20
# What is hashed and then copied stays in the processor's cache in between.
_STEP_BYTES = 1 << 17


class DirectWriter:
    """Writes one file after another through one buffer; to be used by one thread at a time."""

    def __init__(self) -> None:
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # begins at a page

    def write(self, path: str | Path, parts: Iterable[Any], on_bytes: Callable[[memoryview], object]) -> int:
        """Write a new file and sync it.

        Args:
            path: Does not exist.
            parts: Contiguous buffers, written one after another.
            on_bytes: Is shown every byte once and in order; `update` of a digest.

        Returns:
            Bytes written.

        Raises:
            OSError: As the system gives it.
        """
        descriptor = _open_new(path)
        try:
            size = filled = 0
            for part in parts:
                rest = memoryview(part).cast("B")
                while len(rest):
                    piece = rest[: min(_STEP_BYTES, _BUFFER_BYTES - filled)]
                    on_bytes(piece)
                    self._buffer[filled : filled + len(piece)] = piece
                    rest, filled, size = rest[len(piece) :], filled + len(piece), size + len(piece)
                    if filled == _BUFFER_BYTES:
                        _write_all(descriptor, self._buffer)
                        filled = 0
            # A direct write takes whole blocks: what is too much is cut off again.
            _write_all(descriptor, self._buffer[: -(-filled // _BLOCK_BYTES) * _BLOCK_BYTES])
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
            return size
        finally:
            os.close(descriptor)


def _open_new(path: str | Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of a file system that has no direct writes
            raise
        return os.open(path, flags | os.O_TRUNC, 0o666)  # the attempt may have made the file


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # The device wants other blocks, or has taken a part of one: the ordinary way for the rest of the file.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
