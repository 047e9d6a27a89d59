"""Datasets as blocks of tokens in training order.

    source      one dataset as a row of blocks; remote reads it by segment through a cache
    sources     the datasets of a run
    order       which block comes when: a pure function of (seed, position)
    cursor      what was taken from each source so far, for checkpoints
    loader      this rank's micro batches, made ahead by threads
    validation  equally many batches on every rank
    dataset     index -> block with its documents

Nothing here depends on how many ranks, threads or restarts there are but which part of the same order a rank is given.
"""

from pretrainkit.stream.cursor import Cursor
from pretrainkit.stream.dataset import PretrainDataset
from pretrainkit.stream.loader import BlockLoader
from pretrainkit.stream.order import Mixture, SourceOrder
from pretrainkit.stream.source import BlockSource
from pretrainkit.stream.sources import check_tokenizers, document_boundary, open_sources
from pretrainkit.stream.validation import ValidationLoader, build_validation_loader

__all__ = [
    "BlockLoader",
    "BlockSource",
    "Cursor",
    "Mixture",
    "PretrainDataset",
    "SourceOrder",
    "ValidationLoader",
    "build_validation_loader",
    "check_tokenizers",
    "document_boundary",
    "open_sources",
]
