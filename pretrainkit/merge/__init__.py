"""The nodes' folders -> one dataset.

Comes in: `OUT/train` (or `OUT/val`) as optimize wrote it, on one node or a thousand. Goes out: one folder with one
`index.json` that stock litdata streams. Guarantees: the result depends on the units' records alone, not on which node
made which or on how often the merge was interrupted; every chunk is checked against its record before the dataset is
visible; `index.json` is written last, so its presence means complete; nothing else in the target is touched.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pretrainkit.errors import DatasetError, StorageError
from pretrainkit.locks import folder_lock
from pretrainkit.merge.describe import describe
from pretrainkit.merge.layout import Output
from pretrainkit.merge.parallel import in_threads
from pretrainkit.merge.target import claim, copy_tokenizer_of, is_finished, publish
from pretrainkit.merge.transfer import MergeMode, Placed, find_intact, place_joined, place_whole
from pretrainkit.merge.work import Work, prepare
from pretrainkit.metadata import DatasetInfo
from pretrainkit.signals import interruptible
from pretrainkit.statistics import counted
from pretrainkit.storage import given_path, is_remote
from pretrainkit.verify import VerifyLevel

logger = logging.getLogger(__name__)


def merge_datasets(
    source_dir: str, target_dir: str, mode: MergeMode = "auto", verify: VerifyLevel = "fast"
) -> DatasetInfo:
    """Merge what optimize wrote on any number of nodes into one streaming dataset.

    Safe to interrupt and run again; running a finished merge again does nothing.

    Args:
        source_dir: One split of optimize's output: OUT/train or OUT/val, with the folders of all nodes; or a URL.
        target_dir: Folder or URL to write; missing, empty, or an interrupted run of this same merge.
        mode: How chunks get there. auto: hard link, else rename, else copy with checksum. link, move, copy: that one.
            Between object stores, always a copy.
        verify: fast: every chunk's size and offsets table against its record. full: every byte and id as well.

    Returns:
        What the merged dataset holds, as written to its metadata.json.

    Raises:
        DatasetError: A source is damaged, incomplete, or does not belong to the others; nothing is published.
        StorageError: The target holds something else, is in use, or cannot be written.

    Example:
        >>> info = merge_datasets("OUT/train", "DATA/train")
        >>> info.tokens
        1234567
    """
    source, target = given_path(source_dir, "source_dir"), given_path(target_dir, "target_dir")
    started = time.monotonic()
    with interruptible("nothing is lost: run the same command again to go on"):
        if is_remote(target):
            if mode in ("link", "move"):
                raise StorageError(f"mode={mode}, but object stores know no links and renames; use --mode=auto")
            from pretrainkit.merge.remote import merge_to_remote

            info, work, placed = merge_to_remote(source, target, verify)
        elif is_remote(source):
            info, work, placed = _merge_fetched(source, Path(target), verify)
        else:
            _check_apart(Path(source), Path(target))
            work = prepare(Path(source), source)
            info, placed = _merge_local(work, Path(target), mode, verify)
    if placed is None:
        logger.info("%s is complete already: it holds the same %s", target, counted(len(work.sources.records), "unit"))
    else:
        _report(info, work, placed, target, time.monotonic() - started)
    return info


def _check_apart(source_dir: Path, target_dir: Path) -> None:
    source, target = source_dir.resolve(), target_dir.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise DatasetError(
            f"target_dir={target_dir} and source_dir={source_dir} lie in each other; choose a folder apart"
        )


def _merge_local(
    work: Work, target_dir: Path, mode: MergeMode, level: VerifyLevel
) -> tuple[DatasetInfo, list[Placed] | None]:
    """Merge local folders; the chunks are None when the dataset was complete already."""
    if is_finished(target_dir, work.fingerprint):
        return DatasetInfo.load(target_dir), None
    intact = _verify(work, target_dir, level)
    with folder_lock(target_dir, "merge"):
        claim(target_dir, work.fingerprint, [output.filename for output in work.outputs])
        placed = _place(work, intact, target_dir, mode)
        copy_tokenizer_of(work.sources, target_dir)
        chunks = [p.record for p in placed]
        info = describe(work.sources, chunks, work.tail, intact)
        publish(target_dir, work.fingerprint, info, chunks, work.chunk_bytes)
    return info, placed


def _merge_fetched(source: str, target_dir: Path, level: VerifyLevel) -> tuple[DatasetInfo, Work, list[Placed] | None]:
    """Merge a remote source into a local folder: fetch it beside the target, then move. Safe to interrupt, too."""
    from pretrainkit.merge.remote import fetch

    near = target_dir.with_name(f".{target_dir.name}.fetched")
    fetch(source, near, chunks=False)
    work = prepare(near, source)
    if is_finished(target_dir, work.fingerprint):
        info, placed = DatasetInfo.load(target_dir), None
    else:
        fetch(source, near, chunks=True)
        info, placed = _merge_local(work, target_dir, "move", level)
    shutil.rmtree(near)
    return info, work, placed


def _verify(work: Work, target_dir: Path, level: VerifyLevel) -> list[Path]:
    """Where an intact copy of each source chunk lies."""
    sources = work.sources
    moved_to = {output.parts[0].chunk: target_dir / output.filename for output in work.outputs if output.whole}

    def verify(index: int) -> Path:
        return find_intact(sources.chunks[index], moved_to.get(index), sources.info, level)

    return in_threads(verify, range(len(sources.chunks)), f"verifying chunks ({level})")


def _place(work: Work, intact: Sequence[Path], target_dir: Path, mode: MergeMode) -> list[Placed]:
    chunks, info = work.sources.chunks, work.sources.info

    def place(output: Output) -> Placed:
        target = target_dir / output.filename
        if not output.whole:
            return place_joined(output, chunks, intact, target, info)
        index = output.parts[0].chunk
        return place_whole(intact[index], target, chunks[index].record, mode)

    return in_threads(place, work.outputs, "merging chunks")


def _report(info: DatasetInfo, work: Work, placed: Sequence[Placed], target: str, seconds: float) -> None:
    how = ", ".join(f"{count:,} {name}" for name, count in sorted(Counter(p.how for p in placed).items()))
    logger.info(
        "%s: %s, %s in %s (%s) from %s of %s in %.1f s",
        target,
        counted(info.documents, "document"),
        counted(info.tokens, "token"),
        counted(info.chunks, "chunk"),
        how,
        counted(info.units, "unit"),
        counted(len(work.sources.folders), "node folder"),
        seconds,
    )
    for reason, count in info.dropped.items():
        logger.info("  dropped %s of %s: %s", f"{count:,}", counted(info.documents_in, "row"), reason)
