"""Blocks in training order, in micro batches, ahead of time.

Comes in: opened sources, their weights, and this rank's place. Goes out: this rank's micro batches, step by step,
without end. Guarantee: step s covers the same global samples on any number of ranks and loader threads, started
anywhere; the digest proves it, because it is the same for the same tokens in the same places and adds up over ranks.

Samples are numbered from the beginning of the run, whatever the batch size was meanwhile. A step takes the next
`global_batch_size` of them; rank r of W takes the r-th of W equal runs of these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import xxhash

from pretrainkit.errors import ConfigError
from pretrainkit.stream.cursor import Cursor
from pretrainkit.stream.order import SourceOrder
from pretrainkit.stream.source import BlockSource

# Blocks made by one task: enough to share the cost of working out their order, few enough to stay in the caches.
_TASK_BLOCKS = 64
_DIGEST_MASK = (1 << 63) - 1
_NOTHING = np.empty(0, dtype=np.int64)


_Batch = tuple[torch.Tensor, int]  # (micro_batch, block_size + 1) int64 tokens, and their digest


class BlockLoader:
    """An endless iterator over this rank's micro batches, `{"tokens": (micro_batch, block_size + 1) int64}`.

    Args:
        sources: From `open_sources`.
        cursor: Which shares the sources have, and since when; None: equal ones, from the beginning.
        micro_batch_size: Blocks per batch.
        global_batch_size: Blocks per step over all ranks.
        rank: This process.
        world_size: Processes in all.
        seed: Determines the order, with the sources.
        shuffle: False reads every source in the order on disk.
        start_sample: First global sample to give; any one, at no cost.
        num_workers: Threads that work ahead; 0 works when asked.
        prefetch_batches: Micro batches held ready, at least.
        pin_memory: Put batches where a GPU can fetch them by itself.

    Raises:
        ConfigError: The global batch is not a multiple of micro batch x world size.
    """

    def __init__(
        self,
        sources: Sequence[BlockSource],
        *,
        cursor: Cursor | None = None,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        start_sample: int = 0,
        num_workers: int = 1,
        prefetch_batches: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
                f"{micro_batch_size} x {world_size}"
            )
        self.sources = list(sources)
        self._cursor = cursor or Cursor.begin(self.sources, [1.0] * len(self.sources))
        self._mixture = self._cursor.mixture
        self._orders = [
            SourceOrder(source.segment_starts, seed=seed, source=place.order, shuffle=shuffle)
            for source, place in zip(self.sources, self._cursor.active, strict=True)
        ]
        self._micro_batch, self._global_batch = micro_batch_size, global_batch_size
        self._rank, self._world_size = rank, world_size
        self.micro_batches_per_step = global_batch_size // (micro_batch_size * world_size)
        self._pin_memory = pin_memory
        self._task_batches = max(1, _TASK_BLOCKS // micro_batch_size)
        self._start_sample = start_sample
        self._given = 0  # micro batches so far
        self._digest = 0
        self._windows: list[tuple[int, int] | None] = [None] * len(self.sources)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader") if num_workers else None
        self._tasks_ahead = -(-prefetch_batches // self._task_batches) if num_workers else 0
        self._pending: deque[Future[list[_Batch]]] = deque()
        self._next_task = 0  # first micro batch of the next task to begin
        self._ready: Iterator[_Batch] = iter(())

    @property
    def num_blocks(self) -> int:
        """Blocks in one pass over every source."""
        return sum(source.num_blocks for source in self.sources)

    @property
    def next_sample(self) -> int:
        """The first global sample of the step under way, or of the next one; every sample before it has been given."""
        return self._start_sample + self._given // self.micro_batches_per_step * self._global_batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._ready, None)
        if batch is None:
            self._ready = self._take_task()
            batch = next(self._ready)
        tokens, digest = batch
        self._given += 1
        self._digest = (self._digest + digest) & _DIGEST_MASK
        return {"tokens": tokens}

    def digest(self) -> int:
        """Digest of the tokens given since the last call.

        Its sum over ranks, modulo 2^63, is the same on any topology.
        """
        digest, self._digest = self._digest, 0
        return digest

    def tokens_per_source(self) -> dict[str, int]:
        """Tokens in the steps given so far since the run began, from each source's folder, over all ranks; exact."""
        tokens: dict[str, int] = {}
        for source in self._cursor.after(self.next_sample):
            tokens[source.folder] = tokens.get(source.folder, 0) + source.tokens
        return tokens

    def close(self) -> None:
        """Stop the threads, and let go of the sources. The loader cannot be used afterwards."""
        for future in self._pending:
            future.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for source in self.sources:
            source.close()

    def samples(self, first: int, count: int) -> np.ndarray:
        """Global numbers of the samples in `count` micro batches, counted from where this rank's loader began.

        Returns:
            (count x micro_batch,) int64.
        """
        batches = np.arange(first, first + count)
        steps, within = np.divmod(batches, self.micro_batches_per_step)
        per_rank = self._global_batch // self._world_size
        starts = steps * self._global_batch + self._rank * per_rank + within * self._micro_batch
        numbers: np.ndarray = self._start_sample + starts[:, None] + np.arange(self._micro_batch)
        return numbers.ravel()

    def _take_task(self) -> Iterator[_Batch]:
        if self._pool is None:
            return self._make_batches(self._advance())
        while len(self._pending) <= self._tasks_ahead:
            self._pending.append(self._pool.submit(self._make_list, self._advance()))
        return iter(self._pending.popleft().result())

    def _advance(self) -> int:
        first, self._next_task = self._next_task, self._next_task + self._task_batches
        return first

    def _make_list(self, first: int) -> list[_Batch]:
        return list(self._make_batches(first))

    def _make_batches(self, first: int) -> Iterator[_Batch]:
        """This rank's micro batches from its `first` on, as many as one task has."""
        samples = self.samples(first, self._task_batches)
        numbers = samples.tolist()
        views: list[Any] = self._views(samples)
        for start in range(0, len(views), self._micro_batch):
            shape = (self._micro_batch, self.sources[0].block_tokens)
            tokens = torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory)
            rows = tokens.numpy()
            digest = 0
            for row in range(self._micro_batch):
                view = views[start + row]
                # Seeded with its place in the global order, so that a swap of two blocks shows.
                digest += xxhash.xxh3_64_intdigest(view, seed=numbers[start + row])
                rows[row] = view
            yield tokens, digest & _DIGEST_MASK

    def _views(self, samples: np.ndarray) -> list[np.ndarray]:
        """The blocks of these global samples, as they lie on disk."""
        chosen, positions = self._mixture.split(samples)
        if len(self.sources) == 1:
            return self._source_views(0, positions)
        views: list[np.ndarray] = [_NOTHING] * len(samples)
        for index in range(len(self.sources)):
            places = np.flatnonzero(chosen == index)
            if len(places):
                found = self._source_views(index, positions[places])
                for place, view in zip(places.tolist(), found, strict=True):
                    views[place] = view
        return views

    def _source_views(self, index: int, positions: np.ndarray) -> list[np.ndarray]:
        self._prefetch(index, int(positions[0]))
        return self.sources[index].views(self._orders[index].blocks(positions))

    def _prefetch(self, index: int, position: int) -> None:
        """Where a source enters a window of its shuffle, have that one and the next fetched."""
        order = self._orders[index]
        window = order.window_number(position)
        if window != self._windows[index]:
            self._windows[index] = window
            for ahead in (0, 1):
                self.sources[index].prefetch(order.window_segments(position, ahead))
