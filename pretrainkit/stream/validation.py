"""Validation batches: the same blocks at every validation, the same number of batches on every rank.

Comes in: an opened validation split. Goes out: micro batches for one rank. Guarantee: all ranks get equally many
batches, so that none waits for another for ever; the blocks are the first so many of one shuffle of the whole split:
how many follows from the batch, the limit and the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pretrainkit.errors import DatasetError
from pretrainkit.stream.order import SourceOrder
from pretrainkit.stream.source import BlockSource

# The sample must not move with the run's seed: losses of two runs are compared.
_SAMPLE_SEED = 0


class ValidationLoader:
    """One rank's validation batches, `{"tokens": (micro_batch, block_size + 1) int64}`; iterate as often as needed."""

    def __init__(self, source: BlockSource, numbers: np.ndarray, order: SourceOrder, pin_memory: bool) -> None:
        self.source = source
        self._numbers = numbers  # (batches, micro_batch) places in the sample
        self._order = order
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for numbers in self._numbers:
            tokens = torch.from_numpy(self.source.blocks(self._order.blocks(numbers)))
            yield {"tokens": tokens.pin_memory() if self._pin_memory else tokens}


def build_validation_loader(
    source: BlockSource,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_iters: int | None = None,
    pin_memory: bool = False,
) -> ValidationLoader:
    """One rank's validation batches.

    Args:
        source: A validation split, from `open_sources(..., "val", ...)`.
        micro_batch_size: Blocks per batch; fewer where the split has not that many for every rank.
        rank: This process.
        world_size: Processes in all.
        max_iters: Batches per rank at most; None takes as many as the split fills on every rank.
        pin_memory: Put batches where a GPU can fetch them by itself.

    Raises:
        DatasetError: The split has not one block for every rank.
    """
    micro_batch_size = min(micro_batch_size, source.num_blocks // world_size)
    if micro_batch_size == 0:
        raise DatasetError(
            f"{source.folder} holds {source.num_blocks:,} blocks of {source.block_tokens:,} tokens, fewer than the "
            f"{world_size} ranks: some would have nothing to validate on; make a larger validation split"
        )
    per_round = micro_batch_size * world_size
    rounds = source.num_blocks // per_round
    rounds = rounds if max_iters is None else min(rounds, max_iters)
    numbers = np.arange(rounds * per_round).reshape(rounds, world_size, micro_batch_size)[:, rank]
    order = SourceOrder(source.segment_starts, seed=_SAMPLE_SEED, source=0, shuffle=True)
    return ValidationLoader(source, numbers, order, pin_memory)
