"""What there is to merge: checked sources, their layout, and one hash over both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrainkit.errors import DatasetError
from pretrainkit.merge.layout import Output, Part, lay_out
from pretrainkit.merge.sources import Sources, load_sources
from pretrainkit.metadata import DatasetInfo
from pretrainkit.statistics import counted

_DEFAULT_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Work:
    """Everything that is known before a chunk is opened."""

    sources: Sources
    """The node folders' records."""
    outputs: tuple[Output, ...]
    """The merged chunks, in order."""
    tail: tuple[Part, ...]
    """What fills no whole block at the very end."""
    chunk_bytes: int
    """Size that chunks are aimed at."""
    fingerprint: str
    """Hash over everything that determines the merged bytes."""


def prepare(source_dir: Path, shown: str) -> Work:
    """Read the records and plan the merge.

    Args:
        source_dir: Local folder with the node folders, or one of them.
        shown: What the user calls it.

    Raises:
        DatasetError: The sources are damaged, incomplete, do not belong together, or hold nothing.
    """
    sources = load_sources(source_dir)
    if not sources.chunks:
        raise DatasetError(
            f"there is no document in the {counted(len(sources.records), 'unit')} of {shown}: nothing to merge; give "
            "optimize more data or another val_fraction"
        )
    setting = sources.info.settings.get("chunk_bytes")
    chunk_bytes = setting if isinstance(setting, int) and setting > 0 else _DEFAULT_CHUNK_BYTES
    outputs, tail = lay_out(
        [chunk.record.tokens for chunk in sources.chunks],
        itemsize={"uint16": 2, "int32": 4}[sources.info.token_dtype],
        block_size=sources.info.block_size,
        chunk_bytes=chunk_bytes,
    )
    if not outputs:
        raise DatasetError(
            f"no block of {sources.info.block_size:,} is filled by the "
            f"{counted(sum(part.tokens for part in tail), 'token')} of {shown}; give optimize more data or a smaller "
            "block_size"
        )
    return Work(
        sources=sources,
        outputs=tuple(outputs),
        tail=tuple(tail),
        chunk_bytes=chunk_bytes,
        fingerprint=_fingerprint(sources.info, [chunk.record.checksum for chunk in sources.chunks], outputs),
    )


def _fingerprint(info: DatasetInfo, checksums: Sequence[str], outputs: Sequence[Output]) -> str:
    content = {
        "info": asdict(info),
        "checksums": checksums,
        "outputs": [[o.filename, [(part.chunk, part.start, part.stop) for part in o.parts]] for o in outputs],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
