"""One dataset as a row of blocks, wherever it lies and whoever wrote it.

Comes in: a folder or URL with an `index.json`, ours or stock litdata's. Goes out: any block of `block_size` + 1 tokens
by its number, in any order. Guarantee: an index that does not describe plain token chunks is refused before a chunk is
opened; a chunk whose size or offsets do not fit the index is refused when it is first touched, by name.

Blocks do not overlap and do not cross chunks: chunk after chunk gives `tokens // (block_size + 1)` of them, as in
litdata's TokensLoader. What is left at chunk ends is out of reach and counted.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pretrainkit.errors import DatasetError
from pretrainkit.formats.litdata import INDEX_FILENAME, ChunkEntry, header_bytes, parse_index, read_chunk
from pretrainkit.metadata import METADATA_FILENAME, DatasetInfo
from pretrainkit.storage import exists, is_remote, join, read_bytes

logger = logging.getLogger(__name__)

# Neighbouring blocks that travel together: large enough for an object store's request to be worth while, small enough
# that a window of them comes from all over the dataset.
SEGMENT_BYTES = 1 << 20
SEGMENT_BLOCKS = 256
# Above this many segments they grow instead, so that an epoch's order stays small in memory.
MAX_SEGMENTS = 1 << 18
# Files held open at a time; the usual limit of a process is 1,024.
_OPEN_PARTS = 256


class PartReader(Protocol):
    """Tokens by part: whole chunks of a local dataset, segments of a remote one."""

    part_starts: np.ndarray
    """(parts + 1,) int64: number of the first block of each part."""
    read: Callable[[int], np.ndarray]
    """The part's tokens, at least its whole blocks; safe to call from many threads."""

    def prefetch(self, segments: np.ndarray) -> None:
        """Begin to bring these segments near; returns at once."""
        ...

    def close(self) -> None:
        """Let go of files and threads."""
        ...


class BlockSource:
    """A dataset folder opened for reading blocks.

    Args:
        folder: Folder or URL with an `index.json`.
        block_size: The model's context; a block holds one token more, the last one's target.
        vocabulary: The model's padded vocabulary size; a block with an id beyond it is refused when the dataset has no
            metadata.json to say so at once (see `models.check_vocabulary`).
        cache_dir: Where segments of a remote dataset are kept; None takes a folder of this user's in the temporary one.
        max_cache_bytes: Remote segments kept at a time.
        may_be_empty: Take a dataset without one whole block, too; reading it is then a bug.

    Raises:
        DatasetError: No index, a damaged one, or no chunk as long as a block.
        StorageError: A URL whose package is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        block_size: int,
        *,
        vocabulary: int | None = None,
        cache_dir: Path | None = None,
        max_cache_bytes: int = 50_000_000_000,
        may_be_empty: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self.folder = str(folder)
        self.block_tokens = block_size + 1
        index = _read_text(join(folder, INDEX_FILENAME), f"{folder} has no {INDEX_FILENAME}: merge has not finished it")
        self.entries, self.dtype = parse_index(index, join(folder, INDEX_FILENAME))
        self.info = _read_info(folder)
        self.fingerprint = hashlib.sha256(index.encode()).hexdigest()
        blocks = np.array([entry.dim // self.block_tokens for entry in self.entries], dtype=np.int64)
        self.chunk_starts = np.concatenate([[0], np.cumsum(blocks)])
        self.num_blocks = int(self.chunk_starts[-1])
        self.num_tokens = sum(entry.dim for entry in self.entries)
        if self.num_blocks or not may_be_empty:
            self._check_blocks()
        self.segment_starts = _segment_starts(self.chunk_starts, self.block_tokens * self.dtype.itemsize)
        self._reader: PartReader
        if is_remote(self.folder):
            from pretrainkit.stream.remote import RemoteSegments

            self._reader = RemoteSegments(self, cache_dir=cache_dir, max_cache_bytes=max_cache_bytes)
        else:
            self._reader = LocalChunks(Path(self.folder), self.entries, self.dtype, self.chunk_starts)

    @property
    def unreachable_tokens(self) -> int:
        """Tokens at chunk ends that fill no block."""
        return self.num_tokens - self.num_blocks * self.block_tokens

    def check_files(self) -> None:
        """Look at the size of every chunk of a local dataset, without opening one; for one process of a run to call.

        Raises:
            DatasetError: A chunk is missing or cut short, which would end a run when it comes to it.
        """
        if is_remote(self.folder):
            return
        for entry in self.entries:
            path = Path(self.folder) / entry.filename
            expected = header_bytes(entry.chunk_size) + entry.dim * self.dtype.itemsize
            if not path.is_file():
                raise DatasetError(f"{path} is missing; make the dataset again or fetch the file")
            if path.stat().st_size != expected:
                raise DatasetError(
                    f"{path} has {path.stat().st_size:,} bytes, its index says {expected:,}; it is damaged"
                )

    def warn_of_unreachable_tokens(self) -> None:
        """Say so when they are more than a hundredth; for one process of a run to call, once."""
        if self.unreachable_tokens > 0.01 * self.num_tokens:
            logger.warning(
                "%s: %.1f %% of its tokens lie at chunk ends that fill no block of %d; merge it with block_size=%d",
                self.folder, 100 * self.unreachable_tokens / self.num_tokens, self.block_tokens, self.block_tokens,
            )  # fmt: skip

    def views(self, blocks: np.ndarray) -> list[np.ndarray]:
        """The blocks as read-only views of the dataset, each (block_size + 1,) of the type on disk.

        Raises:
            DatasetError: A chunk is missing or damaged, or holds ids beyond the model's vocabulary.
        """
        starts = self._reader.part_starts
        parts = np.searchsorted(starts, blocks, side="right") - 1
        begins = (blocks - starts[parts]) * self.block_tokens
        read, length = self._reader.read, self.block_tokens
        views = [
            read(part)[begin : begin + length] for part, begin in zip(parts.tolist(), begins.tolist(), strict=True)
        ]
        if self._vocabulary is not None:
            self._check_ids(views, self._vocabulary)
        return views

    def _check_ids(self, views: list[np.ndarray], vocabulary: int) -> None:
        """Refuse ids without an embedding: a GPU would say no more than that an assertion failed."""
        wrong = max(int(view.max()) for view in views)
        if wrong < vocabulary and self.dtype.kind == "i":
            wrong = min(int(view.min()) for view in views)
        if 0 <= wrong < vocabulary:
            return
        if self.info is not None and wrong > self.info.max_token_id:
            raise DatasetError(
                f"{self.folder} holds the token id {wrong}, beyond the {self.info.max_token_id} that its metadata.json "
                "says; it is damaged, see which chunk with `pretrainkit inspect --verify=full` and merge it again"
            )
        raise DatasetError(
            f"{self.folder} holds the token id {wrong}, and the model has embeddings for {vocabulary}; it was made "
            "with another tokenizer, choose a model whose vocabulary fits"
        )

    def blocks(self, blocks: Sequence[int] | np.ndarray) -> np.ndarray:
        """The blocks with these numbers, (n, block_size + 1) int64."""
        return np.stack(self.views(np.asarray(blocks, dtype=np.int64))).astype(np.int64)

    def prefetch(self, segments: np.ndarray) -> None:
        """Begin to fetch these segments in the background; nothing to do for a local dataset."""
        self._reader.prefetch(segments)

    def close(self) -> None:
        """Let go of files and threads."""
        self._reader.close()

    def _check_blocks(self) -> None:
        longest = max((entry.dim for entry in self.entries), default=0)
        if self.num_blocks == 0:
            raise DatasetError(
                f"{self.folder} holds {self.num_tokens:,} tokens in {len(self.entries):,} chunks of at most "
                f"{longest:,}: not one block of {self.block_tokens:,} tokens; lower train.max_seq_length or add data"
            )


class LocalChunks:
    """Memory-mapped chunk files, a bounded number of them open."""

    def __init__(self, folder: Path, entries: list[ChunkEntry], dtype: np.dtype, starts: np.ndarray) -> None:
        self.part_starts = starts
        self._folder, self._entries, self._dtype = folder, entries, dtype
        self._open = OpenParts(self._map)
        # Bound here: one call less for every block.
        self.read: Callable[[int], np.ndarray] = self._open.get

    def prefetch(self, segments: np.ndarray) -> None:
        """Nothing: the operating system reads ahead."""

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()

    def _map(self, part: int) -> np.ndarray:
        entry = self._entries[part]
        path = self._folder / entry.filename
        tokens, _ = read_chunk(path, self._dtype)
        if len(tokens) != entry.dim:
            raise DatasetError(
                f"{path} holds {len(tokens):,} tokens, its index says {entry.dim:,}; it is damaged, make it again"
            )
        return np.asarray(tokens)  # a plain array: slicing a memmap costs ten times as much


class OpenParts:
    """The parts used last, opened once however many threads ask."""

    def __init__(self, open_part: Callable[[int], np.ndarray]) -> None:
        self._open_part = open_part
        self._parts: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, part: int) -> np.ndarray:
        """The part's tokens."""
        tokens = self._parts.get(part)  # without the lock: a dictionary's get is atomic, and a late eviction harmless
        if tokens is not None:
            return tokens
        tokens = self._open_part(part)
        with self._lock:
            self._parts[part] = tokens
            if len(self._parts) > _OPEN_PARTS:
                self._parts.popitem(last=False)
        return tokens

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._parts.clear()


def _read_text(path: str, missing: str) -> str:
    try:
        return read_bytes(path).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(missing) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not text; the dataset is damaged, make it again") from error


def _read_info(folder: str | Path) -> DatasetInfo | None:
    path = join(folder, METADATA_FILENAME)
    return DatasetInfo.from_json(_read_text(path, path), path) if exists(path) else None


def _segment_starts(chunk_starts: np.ndarray, block_bytes: int) -> np.ndarray:
    """First block of each segment, and the number of blocks: (segments + 1,) int64. Segments do not cross chunks."""
    blocks = max(1, min(SEGMENT_BLOCKS, SEGMENT_BYTES // block_bytes))
    blocks *= max(1, -(-int(chunk_starts[-1]) // (blocks * MAX_SEGMENTS)))
    pieces = [np.arange(start, stop, blocks) for start, stop in itertools.pairwise(chunk_starts)]
    return np.concatenate([*pieces, chunk_starts[-1:]])
