"""Documents inside a block: token ids -> document ids -> attention masks and loss targets.

Comes in: blocks of tokens and the dataset's boundary rule. Goes out: which document each position belongs to, which
targets count, and who may attend to whom. Guarantee: derived from the tokens alone; text can never forge a boundary,
because optimize writes special ids nowhere but at boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrainkit.errors import DatasetError
from pretrainkit.metadata import Boundary, DatasetInfo

IGNORED_TARGET = -100  # the id that cross entropy skips, by PyTorch's convention


@dataclass(frozen=True, kw_only=True)
class DocumentBoundary:
    """How a document's ends are written in a token stream."""

    rule: Boundary
    """Which ends carry a marker."""
    bos_id: int | None = None
    """Marker before a document, for rules "bos" and "both"."""
    eos_id: int | None = None
    """Marker after a document, for rules "eos" and "both"."""

    def __post_init__(self) -> None:
        missing = (self.rule in ("bos", "both") and self.bos_id is None) or (
            self.rule in ("eos", "both") and self.eos_id is None
        )
        if missing:
            raise DatasetError(
                f"documents cannot be told apart: the boundary rule is {self.rule!r}, but the tokenizer's ids are "
                f"bos {self.bos_id} and eos {self.eos_id}; turn document_mask off or make the dataset again"
            )

    @classmethod
    def of(cls, info: DatasetInfo) -> DocumentBoundary:
        """The rule a dataset was written with.

        Raises:
            DatasetError: Its tokenizer lacks the marker its rule asks for.
        """
        return cls(rule=info.boundary, bos_id=info.tokenizer.bos_id, eos_id=info.tokenizer.eos_id)

    def document_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index of the document each token belongs to, counted from the start of its block.

        Args:
            tokens: (..., length) ids.

        Returns:
            (..., length) int32, 0 for the document a block begins in.
        """
        bos = -1 if self.bos_id is None else self.bos_id  # -1: no token has that id
        eos = -1 if self.eos_id is None else self.eos_id
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        if self.rule == "eos":
            starts[..., 1:] = tokens[..., :-1] == eos
        elif self.rule == "both" and bos == eos:
            # One id for both ends: the second of two neighbours begins a document, since no document is empty.
            starts[..., 1:] = (tokens[..., 1:] == bos) & (tokens[..., :-1] == bos)
        else:
            starts[..., 1:] = tokens[..., 1:] == bos
        return starts.cumsum(-1, dtype=torch.int32)

    def mask_targets(self, targets: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
        """Targets with IGNORED_TARGET where the next token belongs to another document.

        Under the rule "bos" the marker of the next document is also how this one ends, and stays a target.

        Args:
            targets: (..., length) ids, each the token after its position.
            document_ids: (..., length + 1) of the whole block.
        """
        foreign = document_ids[..., 1:] != document_ids[..., :-1]
        if self.rule == "bos":
            foreign = foreign & (targets != self.bos_id)
        return targets.masked_fill(foreign, IGNORED_TARGET)


def allowed_attention(
    length: int, document_ids: torch.Tensor | None, window: int | None, device: torch.device
) -> torch.Tensor:
    """Who may attend to whom, as a plain matrix.

    Args:
        length: Positions in a block.
        document_ids: (batch, length); None for one document.
        window: Positions a token sees, itself included; None for all before it.
        device: Where to make it.

    Returns:
        (batch or 1, 1, length, length) bool, [.., query, key].
    """
    position = torch.arange(length, device=device)
    allowed = position[:, None] >= position[None, :]
    if window is not None:
        allowed = allowed & (position[:, None] - position[None, :] < window)
    allowed = allowed[None, None]
    if document_ids is not None:
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return allowed
