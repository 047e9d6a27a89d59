"""The datasets of a run: which folders hold the split that is asked for, and whether they fit together.

Comes in: dataset folders with their weights. Goes out: one `BlockSource` each. Guarantee: their ids come from one
tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrainkit.errors import DatasetError
from pretrainkit.formats.litdata import INDEX_FILENAME
from pretrainkit.metadata import METADATA_FILENAME
from pretrainkit.models.documents import DocumentBoundary
from pretrainkit.storage import exists, join
from pretrainkit.stream.source import BlockSource


def open_sources(
    sources: Mapping[str, float],
    split: str,
    block_size: int,
    *,
    vocabulary: int | None = None,
    cache_dir: Path | None = None,
    max_cache_bytes: int = 50_000_000_000,
) -> list[BlockSource]:
    """One split of every dataset of a mixture, in the order given.

    Args:
        sources: Dataset folder or URL -> weight. A folder has `train` and `val` in it, or is itself the training split.
        split: "train" or "val"; sources without a validation split are left out of "val".
        block_size: The model's context.
        vocabulary: See `BlockSource`.
        cache_dir: See `BlockSource`.
        max_cache_bytes: See `BlockSource`; shared evenly.

    Raises:
        DatasetError: A source is no dataset, or its tokens were made by another tokenizer than the first's.
    """
    opened = [
        BlockSource(
            folder,
            block_size,
            vocabulary=vocabulary,
            cache_dir=cache_dir,
            max_cache_bytes=max_cache_bytes // len(sources),
            may_be_empty=split == "val",
        )
        for source in sources
        if (folder := _split_folder(source, split)) is not None
    ]
    check_tokenizers(opened)
    return opened


def check_tokenizers(sources: Sequence[BlockSource]) -> None:
    """Refuse datasets whose ids mean different text; one without metadata.json cannot be asked.

    Raises:
        DatasetError: Tokens were made by another tokenizer than the first's.
    """
    described = [(source, source.info.tokenizer) for source in sources if source.info is not None]
    for source, tokenizer in described[1:]:
        first, expected = described[0]
        if tokenizer.sha256 != expected.sha256:
            raise DatasetError(
                f"{source.folder} was made with tokenizer {tokenizer.name!r} ({tokenizer.sha256[:8]}), {first.folder} "
                f"with {expected.name!r} ({expected.sha256[:8]}); their ids mean different text: tokenize both with one"
            )


def document_boundary(sources: Sequence[BlockSource]) -> DocumentBoundary:
    """How documents are told apart, the same in every source.

    Raises:
        DatasetError: A source has no metadata.json, lacks its markers, or follows another rule than the first.
    """
    boundaries = []
    for source in sources:
        if source.info is None:
            raise DatasetError(
                f"{source.folder} has no {METADATA_FILENAME}, so nothing says how its documents are told apart; turn "
                "data.document_mask off or make the dataset with optimize_dataset.py"
            )
        boundaries.append(DocumentBoundary.of(source.info))
        if boundaries[-1] != boundaries[0]:
            raise DatasetError(
                f"{source.folder} marks documents by {boundaries[-1].rule}, {sources[0].folder} by "
                f"{boundaries[0].rule}; make both with one --boundary, or turn data.document_mask off"
            )
    return boundaries[0]


def _split_folder(source: str, split: str) -> str | None:
    folder = join(source, split)
    if exists(join(folder, INDEX_FILENAME)):
        return folder
    if exists(join(source, INDEX_FILENAME)):
        return str(source) if split == "train" else None
    if split != "train" and exists(join(source, "train", INDEX_FILENAME)):
        return None
    raise DatasetError(
        f"{source} holds no dataset: neither {split}/{INDEX_FILENAME} nor {INDEX_FILENAME}; merge it first"
    )
