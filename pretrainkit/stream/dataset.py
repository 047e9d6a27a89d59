"""A dataset as a map: index -> one block with its documents, for notebooks and for other trainers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from pretrainkit.errors import DatasetError
from pretrainkit.models.documents import DocumentBoundary, allowed_attention
from pretrainkit.stream.source import BlockSource


class PretrainDataset:
    """Blocks of one dataset by index, in the order on disk; usable as a map-style `torch.utils.data` dataset.

    Args:
        folder: Folder or URL with an `index.json`.
        block_size: The model's context; items hold one token more, the last one's target.
        boundary: How documents are told apart; None takes it from the dataset's metadata.json.

    Raises:
        DatasetError: No dataset, or nothing says how its documents are told apart.

    Example:
        >>> item = PretrainDataset("data/train", block_size=1024)[0]
        >>> item["token_ids"].shape, item["document_mask"].shape
        (torch.Size([1025]), torch.Size([1025, 1025]))
    """

    def __init__(self, folder: str | Path, block_size: int, *, boundary: DocumentBoundary | None = None) -> None:
        self.source = BlockSource(folder, block_size)
        self.source.warn_of_unreachable_tokens()
        if boundary is None and self.source.info is None:
            raise DatasetError(f"{folder} has no metadata.json to say how documents are told apart; give boundary=")
        self.boundary = boundary or DocumentBoundary.of(self.source.info)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.source.num_blocks

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes of a DataLoader open the dataset anew: open files and locks do not travel.
        return functools.partial(PretrainDataset, boundary=self.boundary), (
            self.source.folder,
            self.source.block_tokens - 1,
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One block.

        Returns:
            token_ids: (block_size + 1,) int64.
            document_ids: (block_size + 1,) int32, counted from 0 in each block.
            document_mask: (block_size + 1, block_size + 1) bool, [query, key]: same document, and not later.

        Raises:
            IndexError: Beyond either end.
        """
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"block {index} of a dataset of {length} blocks")
        tokens = torch.from_numpy(self.source.blocks([index % length])[0])
        documents = self.boundary.document_ids(tokens)
        mask = allowed_attention(len(tokens), documents[None], None, documents.device)[0, 0]
        return {"token_ids": tokens, "document_ids": documents, "document_mask": mask}
