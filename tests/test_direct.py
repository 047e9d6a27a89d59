"""Files written past the page cache hold the same bytes as any other, wherever they lie."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pretrainkit import direct
from pretrainkit.direct import DirectWriter

BLOCK, BUFFER = direct._BLOCK_BYTES, direct._BUFFER_BYTES
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER + 12345]


def written(path: Path, parts: list[bytes]) -> bytes:
    """What a writer showed while it wrote `parts`; it must be what lies there afterwards."""
    seen = bytearray()
    assert DirectWriter().write(path, parts, seen.extend) == len(seen)
    assert path.read_bytes() == seen
    return bytes(seen)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("folder", ["a disk", "memory"])
def test_any_size_is_written_to_the_byte(tmp_path, size, folder):
    data = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file" if folder == "a disk" else Path(f"/dev/shm/pretrainkit-{os.getpid()}")
    try:
        assert written(path, [data[:7], b"", data[7:]]) == data
    finally:
        path.unlink()


def test_one_writer_writes_one_file_after_another(tmp_path):
    writer = DirectWriter()
    for number, tokens in enumerate([np.arange(700_000, dtype=np.int32), np.arange(3, dtype=np.uint16)]):
        writer.write(tmp_path / str(number), [tokens[:1], tokens[1:]], lambda _: None)
        assert (np.fromfile(tmp_path / str(number), tokens.dtype) == tokens).all()


def test_a_file_system_without_direct_writes_gets_ordinary_ones(tmp_path, monkeypatch):
    real = os.open

    def refuse_direct(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            os.close(real(path, os.O_CREAT | os.O_WRONLY, mode))  # as some do: the file is there all the same
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_direct)
    assert written(tmp_path / "file", [b"abc" * BUFFER]) == b"abc" * BUFFER


def test_a_device_that_takes_no_such_blocks_gets_ordinary_writes(tmp_path, monkeypatch):
    real, refused = os.write, []

    def refuse_first(descriptor, data):
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", refuse_first)
    assert written(tmp_path / "file", [b"abc" * BUFFER]) == b"abc" * BUFFER
    assert refused == [BUFFER]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        DirectWriter().write(tmp_path / "file", [b"new"], lambda _: None)
    assert (tmp_path / "file").read_text() == "old"
