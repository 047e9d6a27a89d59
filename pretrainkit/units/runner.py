"""One work unit -> its chunks and its record, atomically; the same function under every executor.

Comes in: the number of a unit. Goes out: `chunk-U-I.bin` files and `units/U.json` in this node's folders. Guarantee:
the record in the training split's folder is written last, so its presence means that the unit is whole; a process
killed at any moment leaves nothing that counts; doing a unit twice, anywhere, gives the same bytes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrainkit.arrow import string_array, string_buffers
from pretrainkit.direct import DirectWriter
from pretrainkit.documents import DocumentBatch, UntrustedShardError, joined, read_range, unusable
from pretrainkit.errors import DatasetError, PretrainKitError
from pretrainkit.memory import keep_freed_memory, return_free_memory
from pretrainkit.plan import PLAN_FILENAME, Plan, Unit
from pretrainkit.records import Failure, UnitRecord, add_counts, record_name
from pretrainkit.storage import fsync_folder, is_remote, join, publish, read_bytes, storage_errors
from pretrainkit.tokenizers import AUTO, EncodedDocuments, Engine
from pretrainkit.tokenizers.auto import (
    EngineDisprovedError,
    check_equal,
    compare_document,
    load_engine,
    reference_engine,
)
from pretrainkit.units.boundaries import Boundaries, TokenArray
from pretrainkit.units.chunks import ChunkWriter, staged_chunk
from pretrainkit.units.stage import Stage
from pretrainkit.units.work import Job, UnitResult

_MAX_FAILURES_RECORDED = 1000
# One document of each 4 MiB batch, of at most this size, is encoded by the reference too: some 1 % of the time.
_CHECKED_DOCUMENT_BYTES = 1024


@dataclass(kw_only=True)
class _Progress:
    """Counts of a unit while it runs."""

    rows: int = 0
    dropped: list[dict[str, int]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def note(self, batch: DocumentBatch) -> None:
        self.rows += batch.rows
        self.dropped.append(batch.dropped)
        self.failures += batch.failures[: _MAX_FAILURES_RECORDED - len(self.failures)]


class UnitRunner:
    """Runs units of one job in this process; what is dear (plan, tokenizer) is loaded once.

    Args:
        job: Which job.
        node: Name of this node's output folders.
        preloaded: Engines that are loaded already, by name.

    Raises:
        DatasetError: The plan in the output folder is another one.
        TokenizerError: The tokenizer cannot be loaded.
    """

    def __init__(self, job: Job, node: str, preloaded: Mapping[str, Engine] | None = None) -> None:
        self._job, self._node = job, node
        self._untrusted: dict[tuple[str, str], str] = {}  # (split, shard) -> why
        text = read_bytes(join(job.output_dir, PLAN_FILENAME)).decode()
        self.plan = Plan.from_json(text, join(job.output_dir, PLAN_FILENAME))
        if self.plan.id != job.plan_id:
            raise DatasetError(f"{job.output_dir} holds another plan now; is a second job writing there?")
        settings, tokenizer_dir = self.plan.settings, Path(job.tokenizer_dir)
        preloaded = preloaded or {}
        self._engine = preloaded.get(self.plan.engine) or load_engine(self.plan.engine, tokenizer_dir)
        reference = reference_engine(tokenizer_dir)
        # An engine chosen by name is the user's decision; one chosen by "auto" goes on proving itself.
        checks = settings.engine == AUTO and self.plan.engine != reference
        self._reference = (preloaded.get(reference) or load_engine(reference, tokenizer_dir)) if checks else None
        return_free_memory()
        self._files = DirectWriter()
        self._boundaries = Boundaries(
            settings.boundary,
            self.plan.tokenizer,
            self.plan.token_dtype,
            job.special_ids,
        )

    def run(self, index: int) -> UnitResult:
        """Do one unit and publish it.

        Raises:
            StorageError: The output cannot be written.
        """
        (result,) = self.run_all([index])
        return result

    def run_all(self, units: Iterable[int]) -> Iterator[UnitResult]:
        """Do units in turn; each is written, synced and published while the next one is encoded.

        Raises:
            StorageError: The output cannot be written.
        """
        publishing: collections.deque[Future[UnitResult]] = collections.deque()
        with ThreadPoolExecutor(1) as publisher:  # writes, syncs and publishes, in order
            for index in units:
                publishing.append(publisher.submit(self._encode(index, publisher)))
                if len(publishing) > 1:  # what was encoded before is in memory until then
                    yield publishing.popleft().result()
            while publishing:
                yield publishing.popleft().result()

    def _encode(self, index: int, publisher: Executor) -> Callable[[], UnitResult]:
        """Read and encode one unit; what is left to do, in the publishing thread, is to call the result."""
        unit = self.plan.units[index]
        stage = Stage(self._job.output_dir, self._node, index)
        writers = {split: self._writer(stage, unit, split, publisher) for split in self.plan.splits}
        progress = _Progress()
        with contextlib.ExitStack() as unless_encoded:
            # In the thread that writes there, after what it was given to write before.
            unless_encoded.callback(lambda: publisher.submit(stage.remove).result())
            try:
                with storage_errors(f"write {self._job.output_dir}"):
                    for batch in self._batches(unit):
                        self._take(batch, unit, writers, progress)
                    for writer in writers.values():
                        writer.close()
            except UntrustedShardError as error:
                self._untrusted[unit.split, error.shard] = str(error)
                return self._encode(index, publisher)  # anew, without it
            except EngineDisprovedError as error:
                disproved = UnitResult(unit=index, committed=False, disproved=str(error))
                return lambda: disproved
            if progress.failures and self._job.on_bad_input == "fail":
                failed = UnitResult(unit=index, committed=False, failures=tuple(progress.failures))
                return lambda: failed
            unless_encoded.pop_all()
        return functools.partial(self._publish, stage, unit, writers, progress)

    def _writer(self, stage: Stage, unit: Unit, split: str, publisher: Executor) -> ChunkWriter:
        return ChunkWriter(
            stage,
            self._files,
            publisher,
            unit=unit.index,
            split=split,
            dtype=self.plan.token_dtype,
            chunk_bytes=self.plan.settings.chunk_bytes,
            block_size=self.plan.settings.block_size,
        )

    def _batches(self, unit: Unit) -> Iterator[tuple[DocumentBatch, str]]:
        """(batch, name of its shard) of a unit, in order."""
        for shard, source in self.plan.sources(unit):
            problem = self._untrusted.get((shard.split, shard.name), shard.problem)
            if problem is not None:
                yield unusable(source, problem), shard.name
                continue
            path = join(self._job.val_root if shard.split == "val" else self._job.train_root, shard.name)
            for batch in joined(read_range(path, source, self.plan.settings.text_column, shard.fingerprint)):
                yield batch, shard.name

    def _take(
        self, item: tuple[DocumentBatch, str], unit: Unit, writers: dict[str, ChunkWriter], progress: _Progress
    ) -> None:
        """Encode one batch and hand it to the writers."""
        batch, shard = item
        progress.note(batch)
        if not len(batch.texts):
            return
        encoded = self._engine.encode(batch.texts)
        self._check_share(batch.texts, encoded)
        texts, encoded = self._without_forged(batch.texts, encoded, shard, progress)
        tokens, lengths = self._boundaries.insert(encoded)
        text_offsets, characters = string_buffers(texts)
        if "val" not in writers or unit.split == "val":
            writers[unit.split].add(tokens, lengths, int(text_offsets[-1]))
            return
        is_val = in_validation(text_offsets, characters, self.plan.settings.val_fraction)
        sizes = np.diff(text_offsets)
        for split, chosen in (("train", ~is_val), ("val", is_val)):
            if chosen.all():
                writers[split].add(tokens, lengths, int(text_offsets[-1]))
            elif chosen.any():
                kept = tokens[np.repeat(chosen, lengths)]
                writers[split].add(kept, lengths[chosen], int(sizes[chosen].sum()))

    def _check_share(self, texts: Any, encoded: EncodedDocuments) -> None:
        """Compare one small document of the batch with the reference; which one follows from the batch alone."""
        if self._reference is None:
            return
        offsets, characters = string_buffers(texts)
        small = np.flatnonzero(np.diff(offsets) <= _CHECKED_DOCUMENT_BYTES)
        if not len(small):  # long documents: the beginning of one
            start = characters[: _CHECKED_DOCUMENT_BYTES // 2].tobytes().decode(errors="ignore")
            check_equal(self._engine, self._reference, string_array([start]))
            return
        index = int(small[int(offsets[-1]) % len(small)])
        expected = self._reference.encode(texts.slice(index, 1)).ids
        got = encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]]
        compare_document(got, expected, texts[index].as_py(), self._engine.name)

    def _without_forged(
        self, texts: Any, encoded: EncodedDocuments, shard: str, progress: _Progress
    ) -> tuple[Any, EncodedDocuments]:
        """Leave out documents for whose text the tokenizer gives a special token's id, as one of an unusual kind might.

        Such a document would forge a boundary; what is left out is located and counted as a bad row.
        """
        forged = self._boundaries.forged(encoded)
        if not len(forged):
            return texts, encoded
        import pyarrow as pa

        keep = np.ones(len(texts), dtype=bool)
        keep[forged] = False
        detail = "the tokenizer gives the id of a special token for the text {!r}"
        progress.note(
            DocumentBatch(
                texts=texts,
                rows=0,
                dropped={"bad_row": len(forged)},
                failures=tuple(
                    Failure(
                        shard=shard,
                        row_group=None,
                        row=None,
                        reason="bad_row",
                        detail=detail.format(texts[i].as_py()[:80]),
                    )
                    for i in forged.tolist()
                ),
            )
        )
        lengths = np.diff(encoded.offsets)
        offsets = np.zeros(int(keep.sum()) + 1, dtype=np.int64)
        np.cumsum(lengths[keep], out=offsets[1:])
        return texts.filter(pa.array(keep)), EncodedDocuments(encoded.ids[np.repeat(keep, lengths)], offsets)

    def _publish(self, stage: Stage, unit: Unit, writers: dict[str, ChunkWriter], progress: _Progress) -> UnitResult:
        """Chunks first, then the validation split's record, then the training split's, which commits the unit."""
        counts = {split: writer.counts() for split, writer in writers.items()}
        try:
            with storage_errors(f"write {self._job.output_dir}"):
                for split, writer in reversed(writers.items()):
                    record = UnitRecord(
                        plan=self.plan.id,
                        unit=unit.index,
                        units_planned=len(self.plan.units),
                        split=split,
                        documents_in=progress.rows,
                        dropped=add_counts(progress.dropped),
                        splits=counts,
                        chunks=writer.chunks(),
                        source=tuple(source for _, source in self.plan.sources(unit)),
                        engine=self.plan.engine,
                        failures=tuple(progress.failures),
                    )
                    lost = record.unaccounted()
                    assert lost == 0, f"unit {unit.index}: {lost} documents unaccounted for"
                    self._publish_split(stage, record)
        finally:
            stage.remove()
        return UnitResult(
            unit=unit.index,
            text_bytes=sum(c.text_bytes for c in counts.values()),
            tokens=sum(c.tokens for c in counts.values()),
            failures=tuple(progress.failures),
        )

    def _publish_split(self, stage: Stage, record: UnitRecord) -> None:
        folder = join(self._job.output_dir, record.split, self._node)
        # The record is staged too: whoever is killed leaves nothing behind but the stage, which is swept.
        staged, target = stage.path / "record.json", join(folder, record_name(record.unit))
        with open(staged, "w", encoding="utf-8") as file:
            file.write(record.to_json())
            file.flush()
            os.fsync(file.fileno())
        if not is_remote(folder):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        for chunk in record.chunks:
            publish(staged_chunk(stage, record.split, chunk.filename), join(folder, chunk.filename))
        if record.chunks and not is_remote(folder):
            fsync_folder(folder)
        # Its own name is synced when the folder is finished: until then a power cut may take it back, and the unit is
        # done again.
        publish(staged, target)


def preload(tokenizer_dir: str, engines: Iterable[str]) -> dict[str, Engine]:
    """Make this process a worker: load engines, and what reading needs, before there is a job.

    An engine that cannot be loaded is left out: it is the driver that says so.
    """
    import pyarrow.parquet  # noqa: F401 - so that the first unit does not wait for it

    keep_freed_memory()
    loaded = {}
    for name in engines:
        with contextlib.suppress(PretrainKitError):
            loaded[name] = load_engine(name, Path(tokenizer_dir))
    return loaded


def in_validation(offsets: TokenArray, characters: TokenArray, fraction: float) -> TokenArray:
    """(documents,) bool: whether each document goes to validation, by a hash of its bytes.

    Args:
        offsets: (documents + 1,) where each document begins in `characters`.
        characters: (bytes,) uint8.
        fraction: Share that goes to validation.
    """
    import xxhash

    data, digest, bounds = characters.data, xxhash.xxh3_64_intdigest, offsets.tolist()
    # One C call per document: a vectorised hash over ragged text costs more than this loop.
    hashes = np.array([digest(data[a:b]) for a, b in itertools.pairwise(bounds)], dtype=np.uint64)
    return hashes < np.uint64(round(fraction * 2**64))
