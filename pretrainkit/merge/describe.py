"""What the merged dataset holds: sums over the units' records, less the tail.

Comes in: the records, the placed chunks, and the parts that fill no whole block at the very end. Goes out:
`DatasetInfo`. Guarantee: every row read is a document of some split or is counted as dropped; tokens are those on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pretrainkit.merge.layout import Part
from pretrainkit.merge.sources import Sources
from pretrainkit.merge.transfer import open_part
from pretrainkit.metadata import DatasetInfo
from pretrainkit.records import ChunkRecord, add_counts, length_histogram


def describe(
    sources: Sources, chunks: Sequence[ChunkRecord], tail: Sequence[Part], intact: Sequence[Path]
) -> DatasetInfo:
    """The merged dataset's metadata.

    Args:
        sources: All records.
        chunks: The merged chunks.
        tail: Parts of source chunks that are left out at the end.
        intact: Where each source chunk lies.
    """
    counts = [record.splits[sources.info.split] for record in sources.records]
    lost = _documents_of_tail(sources, tail, intact)
    lengths = add_counts(c.document_lengths for c in counts)
    for name, count in length_histogram(lost).items() if lost else ():
        lengths[name] = lengths.get(name, 0) - count
    planned = {record.plan: record.units_planned for record in sources.records}
    return dataclasses.replace(
        sources.info,
        documents=sum(c.documents for c in counts) - len(lost),
        tokens=sum(c.tokens for c in chunks),
        text_bytes=sum(c.text_bytes for c in counts),
        chunks=len(chunks),
        max_token_id=max(c.max_token_id for c in chunks),
        documents_in=sum(record.documents_in for record in sources.records),
        dropped=add_counts([*(record.dropped for record in sources.records), {"tail": len(lost)}]),
        tail_tokens=sum(part.tokens for part in tail),
        document_lengths=add_counts([lengths]),
        plans=sorted(planned),
        units=len(sources.records),
        units_planned=sum(planned.values()),
    )


def _documents_of_tail(sources: Sources, tail: Sequence[Part], intact: Sequence[Path]) -> list[int]:
    """Token counts of the documents that lie wholly in the left-out tail."""
    lengths: list[int] = []
    for part in tail:
        view = open_part(part, sources.chunks[part.chunk].record, intact[part.chunk], sources.info)
        sizes = [int(end - start) for start, end in zip([0, *view.ends[:-1]], view.ends, strict=True)]
        if view.continues:
            rest = sizes.pop(0)
            if lengths:
                lengths[-1] += rest
        lengths += sizes
    return lengths
