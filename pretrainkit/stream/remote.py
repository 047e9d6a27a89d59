"""A remote dataset read by segment, through a cache of bounded size that all ranks of a node share.

Comes in: a `BlockSource` at a URL. Goes out: the tokens of any of its segments. Guarantees: a segment is fetched by one
byte range of its chunk, once per node while it stays in the cache; a file in the cache is whole; the cache does not
outgrow its limit by more than what is being fetched; a dropped connection is retried.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrainkit.errors import ConfigError, DatasetError, PretrainKitError
from pretrainkit.formats.litdata import header_bytes
from pretrainkit.locks import folder_lock
from pretrainkit.remote import RetryingFile
from pretrainkit.storage import join, storage_errors
from pretrainkit.stream.order import WINDOW_SEGMENTS
from pretrainkit.stream.source import OpenParts

if TYPE_CHECKING:
    from pretrainkit.stream.source import BlockSource

logger = logging.getLogger(__name__)

_FETCH_THREADS = 8
# Locks that keep two ranks from fetching one segment twice; a segment uses the lock of its number modulo this.
_LOCKS = 64


class RemoteSegments:
    """Segments of a remote dataset, fetched when first needed or asked for ahead."""

    def __init__(self, source: BlockSource, *, cache_dir: Path | None, max_cache_bytes: int) -> None:
        self.part_starts = source.segment_starts
        self._source = source
        self._block_bytes = source.block_tokens * source.dtype.itemsize
        self._max_cache_bytes = max_cache_bytes
        # The fingerprint keeps a dataset that was replaced at its URL apart from the old one, and block sizes too.
        key = hashlib.sha256(f"{source.fingerprint}/{source.block_tokens}".encode()).hexdigest()[:32]
        base = cache_dir or Path(tempfile.gettempdir()) / f"pretrainkit-cache-{os.getuid()}"
        self._folder = base / key
        self._check_limit()
        with storage_errors(f"make the cache folder {self._folder}"):
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(exist_ok=True)
        if base.stat().st_uid != os.getuid():
            raise ConfigError(f"{base} belongs to another user, who could change the data; give data.cache_dir")
        self._open = OpenParts(self._load)
        self.read: Callable[[int], np.ndarray] = self._open.get
        self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="prefetch")
        self._wanted: set[int] = set()
        self._evicting = threading.Lock()
        self._written = 0  # bytes since the cache was last measured

    def prefetch(self, segments: np.ndarray) -> None:
        """Begin to fetch these segments; those of earlier calls that have not begun are kept."""
        for segment in segments.tolist():
            if segment not in self._wanted:
                self._wanted.add(segment)
                self._pool.submit(self._fetch_ahead, segment)

    def close(self) -> None:
        """Stop fetching ahead; what is in the cache stays for the next run."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def _blocks(self, segment: int) -> int:
        return int(self.part_starts[segment + 1] - self.part_starts[segment])

    def _path(self, segment: int) -> Path:
        return self._folder / f"segment-{segment}.bin"

    def _fetch_ahead(self, segment: int) -> None:
        try:
            if not self._path(segment).exists():
                self._fetch(segment)
        except (PretrainKitError, OSError) as error:
            # Whoever needs the segment will try again, and report it.
            logger.debug("fetching segment %d of %s ahead: %s", segment, self._source.folder, error)
        finally:
            self._wanted.discard(segment)

    def _load(self, segment: int) -> np.ndarray:
        for _ in range(3):  # another rank may evict it between fetching and opening
            path = self._path(segment)
            try:
                tokens = np.fromfile(path, dtype=self._source.dtype)
                os.utime(path)  # last used now
            except FileNotFoundError:
                self._fetch(segment)
                continue
            if tokens.nbytes == self._blocks(segment) * self._block_bytes:
                return tokens
            path.unlink(missing_ok=True)  # cut short by a power cut
        raise ConfigError(
            f"segments of {self._source.folder} leave the cache {self._folder} before they are read; "
            "raise data.max_cache_bytes"
        )

    def _fetch(self, segment: int) -> None:
        """Bring one segment into the cache, unless another thread or rank does so first."""
        with folder_lock(self._folder / f"lock-{segment % _LOCKS}", "train", wait=True):
            path = self._path(segment)
            if path.exists():
                return
            data = self._download(segment)
            temporary = path.with_suffix(".part")
            with storage_errors(f"write {path}"):
                temporary.write_bytes(data)
                os.replace(temporary, path)
        self._written += len(data)
        if self._written > self._max_cache_bytes // 16:
            self._evict()

    def _download(self, segment: int) -> bytes:
        source = self._source
        first, last = int(self.part_starts[segment]), int(self.part_starts[segment + 1])
        chunk = int(np.searchsorted(source.chunk_starts, first, side="right")) - 1
        entry = source.entries[chunk]
        begin = header_bytes(entry.chunk_size) + (first - int(source.chunk_starts[chunk])) * self._block_bytes
        try:
            file = RetryingFile(join(source.folder, entry.filename))
        except FileNotFoundError as error:
            raise DatasetError(
                f"{source.folder}/{entry.filename} is missing; make the dataset again or bring the file back"
            ) from error
        expected = header_bytes(entry.chunk_size) + entry.dim * source.dtype.itemsize
        if file.size != expected:
            raise DatasetError(
                f"{source.folder}/{entry.filename} has {file.size:,} bytes, its index says {expected:,}; it is damaged"
            )
        file.seek(begin)
        return file.read((last - first) * self._block_bytes)

    def _evict(self) -> None:
        """Delete the segments used longest ago until the cache is a sixteenth below its limit."""
        with self._evicting:
            self._written = 0
            files = []
            for entry in os.scandir(self._folder):
                if entry.name.startswith("segment-"):
                    try:
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
                    except FileNotFoundError:
                        continue  # another rank evicts, too
            excess = sum(size for _, size, _ in files) - self._max_cache_bytes * 15 // 16
            for _, size, path in sorted(files):
                if excess <= 0:
                    break
                Path(path).unlink(missing_ok=True)
                excess -= size

    def _check_limit(self) -> None:
        lengths = np.sort(np.diff(self.part_starts))[::-1][: 2 * WINDOW_SEGMENTS]
        needed = int(lengths.sum() * self._block_bytes * 8 // 7)
        if self._max_cache_bytes < needed:
            raise ConfigError(
                f"data.max_cache_bytes={self._max_cache_bytes:,} is too small for {self._source.folder}: its shuffle "
                f"needs the blocks of two windows at a time; give it at least {needed:,}"
            )
