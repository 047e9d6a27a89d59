"""The nodes' folders -> one dataset.

Comes in: `OUT/train` (or `OUT/val`) as optimize wrote it, on one node or a thousand. Goes out: one folder with one
`index.json` that stock litdata streams. Guarantees: the result depends on the units' records alone, not on which node
made which or on how often the merge was interrupted; every chunk is checked against its record before the dataset is
visible; `index.json` is written last, so its presence means complete; nothing else in the target is touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pretrainkit.errors import DatasetError
from pretrainkit.merge.describe import describe
from pretrainkit.merge.layout import Output, lay_out
from pretrainkit.merge.sources import Sources, load_sources
from pretrainkit.merge.target import claim, copy_tokenizer_of, is_finished, publish
from pretrainkit.merge.transfer import MergeMode, Placed, find_intact, place_joined, place_whole
from pretrainkit.metadata import DatasetInfo
from pretrainkit.signals import interruptible
from pretrainkit.storage import folder_lock
from pretrainkit.verify import VerifyLevel

logger = logging.getLogger(__name__)

_DEFAULT_CHUNK_BYTES = 64 << 20
_THREADS = 8
# Files per task of a thread: one by one, the hand-over costs more than a link.
_BATCH = 64

_T = TypeVar("_T")
_R = TypeVar("_R")


def merge_datasets(
    source_dir: Path, target_dir: Path, mode: MergeMode = "auto", verify: VerifyLevel = "fast"
) -> DatasetInfo:
    """Merge what optimize wrote on any number of nodes into one streaming dataset.

    Safe to interrupt and run again; running a finished merge again does nothing.

    Args:
        source_dir: One split of optimize's output: OUT/train or OUT/val, or a folder that holds all nodes' folders.
        target_dir: Folder to write; missing, empty, or an interrupted run of this same merge.
        mode: How chunks get there. auto: hard link, else rename, else copy with checksum. link, move, copy: that one.
        verify: fast: every chunk's size and offsets table against its record. full: every byte and id as well.

    Returns:
        What the merged dataset holds, as written to its metadata.json.

    Raises:
        DatasetError: A source is damaged, incomplete, or does not belong to the others; nothing is published.
        StorageError: The target holds something else, is in use, or cannot be written.

    Example:
        >>> info = merge_datasets(Path("OUT/train"), Path("DATA/train"))
        >>> info.tokens
        1234567
    """
    source_dir, target_dir = Path(source_dir), Path(target_dir)
    started = time.monotonic()
    _check_apart(source_dir, target_dir)
    sources = load_sources(source_dir)
    if not sources.chunks:
        raise DatasetError(
            f"the {len(sources.records):,} units of {source_dir} hold no document: nothing to merge; give optimize "
            "more data or another val_fraction"
        )
    outputs, tail = lay_out(
        [chunk.record.tokens for chunk in sources.chunks],
        itemsize=_itemsize(sources.info),
        block_size=sources.info.block_size,
        chunk_bytes=_chunk_bytes(sources.info),
    )
    if not outputs:
        raise DatasetError(
            f"the {sum(part.tokens for part in tail):,} tokens of {source_dir} fill no block of "
            f"{sources.info.block_size:,}; give optimize more data or a smaller block_size"
        )
    fingerprint = _fingerprint(sources, outputs)
    if is_finished(target_dir, fingerprint):
        logger.info("%s is complete already: the same %s units are merged there", target_dir, len(sources.records))
        return DatasetInfo.load(target_dir)
    with interruptible("nothing is lost: run the same command again to go on"):
        intact = _verify(sources, outputs, target_dir, verify)
        with folder_lock(target_dir, "merge"):
            claim(target_dir, fingerprint, [output.filename for output in outputs])
            placed = _place(sources, outputs, intact, target_dir, mode)
            copy_tokenizer_of(sources, target_dir)
            chunks = [p.record for p in placed]
            info = describe(sources, chunks, tail, intact)
            publish(target_dir, fingerprint, info, chunks, _chunk_bytes(sources.info))
    _report(info, sources, placed, target_dir, time.monotonic() - started)
    return info


def _check_apart(source_dir: Path, target_dir: Path) -> None:
    source, target = source_dir.resolve(), target_dir.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise DatasetError(
            f"target_dir={target_dir} and source_dir={source_dir} lie in each other; choose a folder apart"
        )


def _itemsize(info: DatasetInfo) -> int:
    return {"uint16": 2, "int32": 4}[info.token_dtype]


def _chunk_bytes(info: DatasetInfo) -> int:
    """Size chunks are aimed at: optimize's setting, where it tells one."""
    setting = info.settings.get("chunk_bytes")
    return setting if isinstance(setting, int) and setting > 0 else _DEFAULT_CHUNK_BYTES


def _fingerprint(sources: Sources, outputs: Sequence[Output]) -> str:
    """One hash over everything that determines the merged bytes."""
    content = {
        "info": dataclasses.asdict(sources.info),
        "checksums": [chunk.record.checksum for chunk in sources.chunks],
        "outputs": [[o.filename, [(part.chunk, part.start, part.stop) for part in o.parts]] for o in outputs],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verify(sources: Sources, outputs: Sequence[Output], target_dir: Path, level: VerifyLevel) -> list[Path]:
    """Where an intact copy of each source chunk lies."""
    moved_to: dict[int, Path] = {
        output.parts[0].chunk: target_dir / output.filename for output in outputs if output.whole
    }

    def verify(index: int) -> Path:
        return find_intact(sources.chunks[index], moved_to.get(index), sources.info, level)

    return _in_threads(verify, range(len(sources.chunks)), f"verifying chunks ({level})")


def _place(
    sources: Sources, outputs: Sequence[Output], intact: Sequence[Path], target_dir: Path, mode: MergeMode
) -> list[Placed]:
    def place(output: Output) -> Placed:
        target = target_dir / output.filename
        if not output.whole:
            return place_joined(output, sources.chunks, intact, target, sources.info)
        index = output.parts[0].chunk
        return place_whole(intact[index], target, sources.chunks[index].record, mode)

    return _in_threads(place, outputs, "merging chunks")


def _report(info: DatasetInfo, sources: Sources, placed: Sequence[Placed], target_dir: Path, seconds: float) -> None:
    how = ", ".join(f"{count:,} {name}" for name, count in sorted(Counter(p.how for p in placed).items()))
    logger.info(
        "%s: %s documents, %s tokens in %s chunks (%s) from %s units of %s node folders in %.1f s",
        target_dir,
        f"{info.documents:,}",
        f"{info.tokens:,}",
        f"{info.chunks:,}",
        how,
        f"{info.units:,}",
        f"{len(sources.folders):,}",
        seconds,
    )
    for reason, count in info.dropped.items():
        logger.info("  dropped %s of %s rows: %s", f"{count:,}", f"{info.documents_in:,}", reason)


def _in_threads(function: Callable[[_T], _R], items: Sequence[_T], doing: str) -> list[_R]:
    """Results in order. Threads, because what takes time here is the file system, often one far away."""

    def batch(start: int) -> list[_R]:
        return [function(item) for item in items[start : start + _BATCH]]

    pool = ThreadPoolExecutor(_THREADS)
    try:
        return _with_progress(pool.map(batch, range(0, len(items), _BATCH)), len(items), doing)
    finally:
        # On an error or Ctrl+C, what has not begun never begins, and nobody writes after this returns.
        pool.shutdown(wait=True, cancel_futures=True)


def _with_progress(batches: Iterable[list[_R]], total: int, doing: str) -> list[_R]:
    """Collect results; after two seconds say how far it is: a bar on a terminal, a line now and then in a log."""
    from tqdm import tqdm

    collected: list[_R] = []
    bar: Any = tqdm(total=total, desc=doing, delay=2, unit=" chunks", disable=not sys.stderr.isatty(), leave=False)
    next_line = time.monotonic() + 2
    with bar:
        for results in batches:
            collected += results
            bar.update(len(results))
            if bar.disable and time.monotonic() >= next_line:
                logger.info("%s: %s of %s", doing, f"{len(collected):,}", f"{total:,}")
                next_line = time.monotonic() + 10
    return collected
