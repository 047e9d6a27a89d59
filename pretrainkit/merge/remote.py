"""Merging from or to an object store.

Comes in: sources and a target of which at least one is a URL. Goes out: the same bytes as between local folders.
Guarantees: descriptions (records, metadata, indexes) are fetched whole, chunks only where they must be looked into; a
chunk that stays in one store is copied by the store itself; `index.json` is the last object written. An object is
visible whole or not at all, so an interrupted merge goes on with the objects that are there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrainkit.errors import DatasetError, StorageError
from pretrainkit.formats.litdata import INDEX_FILENAME, header_bytes
from pretrainkit.merge.describe import describe
from pretrainkit.merge.layout import Output
from pretrainkit.merge.parallel import in_threads
from pretrainkit.merge.target import MARK, OURS, copy_tokenizer_of, fingerprint_of, publish
from pretrainkit.merge.transfer import Placed, place_joined, renamed
from pretrainkit.merge.work import Work, prepare
from pretrainkit.metadata import METADATA_FILENAME, TOKENIZER_FOLDER, DatasetInfo
from pretrainkit.records import CHUNK_NAME
from pretrainkit.remote import filesystem
from pretrainkit.storage import checksum, is_remote, join, remove, write_atomic
from pretrainkit.verify import CHECKSUMS_FILENAME, VerifyLevel, check_table, check_vocabulary, verify_chunk


def fetch(source: str, target: Path, *, chunks: bool) -> None:
    """Bring a remote folder's files near; those that are there at their size stay.

    Args:
        source: URL.
        target: Local folder.
        chunks: Also the chunk files, not only what describes them.

    Raises:
        DatasetError: There is nothing.
        StorageError: The local folder holds something else.
    """
    fs, inner = filesystem(source)
    found = fs.find(inner, detail=True) if fs.exists(inner) else {}
    if not found:
        raise DatasetError(f"source_dir={source} holds nothing; give OUT/train or OUT/val of optimize")
    names = {path.removeprefix(inner.rstrip("/") + "/"): int(info["size"]) for path, info in found.items()}
    there = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    foreign = [name for name in there if name not in names]
    if foreign:  # the folder is removed when the merge is done
        raise StorageError(f"{target} holds {foreign[0]}, which is no part of {source}; move it away")

    def bring(name: str) -> None:
        path = target / name
        if ".." in Path(name).parts or (path.is_file() and path.stat().st_size == names[name]):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(join(inner, name), str(path))

    wanted = sorted(name for name in names if chunks or not CHUNK_NAME.fullmatch(name.rsplit("/", 1)[-1]))
    in_threads(bring, wanted, f"fetching {source}", batch=1)


class RemoteMerge:
    """One merge into an object store.

    Args:
        source: Folder or URL.
        target: URL.
        level: How closely to look at the sources' chunks.
        scratch: Local folder for what must be looked into.
    """

    def __init__(self, source: str, target: str, level: VerifyLevel, scratch: Path) -> None:
        self._target, self._level, self._scratch = target, level, scratch
        self._source = source
        self._near = scratch / "source" if is_remote(source) else Path(source)
        if is_remote(source):
            fetch(source, self._near, chunks=False)
        self.work: Work = prepare(self._near, source)
        self._fs, self._inner = filesystem(target)
        found = self._fs.find(self._inner, detail=True) if self._fs.exists(self._inner) else {}
        prefix = self._inner.rstrip("/") + "/"
        self._there = {path.removeprefix(prefix): int(info["size"]) for path, info in found.items()}

    def finished(self) -> DatasetInfo | None:
        """The merged dataset's metadata, when it is there and complete.

        Raises:
            StorageError: The target holds anything else.
        """
        if not self._there:
            return None
        state = self._scratch / "state"
        state.mkdir()
        for name in (MARK, CHECKSUMS_FILENAME, METADATA_FILENAME):
            if name in self._there:
                self._fs.get_file(join(self._inner, name), str(state / name))
        theirs, chunks = fingerprint_of(state)
        if theirs != self.work.fingerprint:
            raise StorageError(f"target_dir={self._target} holds other data ({min(self._there)}); give an empty folder")
        names = {output.filename for output in self.work.outputs} | OURS
        foreign = sorted(name for name in self._there if name.split("/")[0] not in names)
        if foreign:
            raise StorageError(f"target_dir={self._target} holds {foreign[0]}, which is no part of this merge")
        whole = all(self._there.get(chunk.filename) == chunk.bytes for chunk in chunks)
        if MARK in self._there or INDEX_FILENAME not in self._there or not (chunks and whole):
            return None
        return DatasetInfo.load(state)

    def run(self) -> tuple[DatasetInfo, list[Placed]]:
        """Verify, copy, join, publish."""
        origins = in_threads(self._find_intact, range(len(self.work.sources.chunks)), "verifying chunks", batch=1)
        write_atomic(join(self._target, MARK), self.work.fingerprint + "\n")
        remove(join(self._target, INDEX_FILENAME))
        wanted = {part.chunk for output in self.work.outputs if not output.whole for part in output.parts}
        wanted |= {part.chunk for part in self.work.tail}
        intact = [Path(origin) for origin in origins]
        order = sorted(wanted)
        for index, path in zip(order, in_threads(lambda i: self._bring(origins[i]), order, "fetching", 1), strict=True):
            intact[index] = path
        placed = in_threads(lambda output: self._place(output, origins, intact), self.work.outputs, "merging chunks", 1)
        return self._publish(placed, intact), placed

    def _find_intact(self, index: int) -> str:
        """URL or path of an intact copy of a source chunk."""
        chunk, info = self.work.sources.chunks[index], self.work.sources.info
        problem: DatasetError | None = None
        for folder in chunk.folders:
            origin = folder / chunk.record.filename
            try:
                if not is_remote(self._source):
                    verify_chunk(origin, chunk.record, info.token_dtype, info.tokenizer.vocab_size, self._level)
                    return str(origin)
                url = join(self._source, origin.relative_to(self._near).as_posix())
                self._verify_remote(url, index)
                return url
            except DatasetError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _verify_remote(self, url: str, index: int) -> None:
        record, info = self.work.sources.chunks[index].record, self.work.sources.info
        fs, inner = filesystem(url)
        try:
            size = int(fs.info(inner)["size"])
        except FileNotFoundError as error:
            raise DatasetError(f"{url} is missing though its record names it; fetch it or make it again") from error
        if size != record.bytes:
            raise DatasetError(
                f"{url} has {size:,} bytes, its record says {record.bytes:,}; it is damaged, make it again"
            )
        check_vocabulary(record, info.tokenizer.vocab_size, url)
        check_table(fs.cat_file(inner, start=0, end=header_bytes(record.items)), record, info.token_dtype, url)
        if self._level == "full":
            path = self._bring(url)
            verify_chunk(path, record, info.token_dtype, info.tokenizer.vocab_size, "full")
            path.unlink()

    def _bring(self, origin: str) -> Path:
        """A local copy of a source chunk; the chunk itself where it is local."""
        if not is_remote(origin):
            return Path(origin)
        fs, inner = filesystem(origin)
        path = self._scratch.joinpath("fetched", *inner.split("/")[-2:])  # node and chunk, for who reads of its damage
        path.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(inner, str(path))
        return path

    def _place(self, output: Output, origins: Sequence[str], intact: Sequence[Path]) -> Placed:
        target = join(self._inner, output.filename)
        if not output.whole:
            local = self._scratch / output.filename
            placed = place_joined(output, self.work.sources.chunks, intact, local, self.work.sources.info)
            self._fs.put_file(str(local), target)
            local.unlink()
            return placed
        index = output.parts[0].chunk
        record = self.work.sources.chunks[index].record
        if self._there.get(output.filename) == record.bytes:  # an object is whole, and the mark says whose it is
            return Placed(renamed(record, output.filename), "kept")
        fs, inner = filesystem(origins[index]) if is_remote(origins[index]) else (None, "")
        if fs is self._fs:
            fs.cp_file(inner, target)
        else:
            self._upload(self._bring(origins[index]), record.checksum, target, keep=fs is None)
        return Placed(renamed(record, output.filename), "copied")

    def _upload(self, path: Path, expected: str, target: str, *, keep: bool) -> None:
        if checksum(path) != expected:
            raise DatasetError(f"{path} has another checksum than its record; it is damaged, make it again")
        self._fs.put_file(str(path), target)
        if not keep:
            path.unlink()

    def _publish(self, placed: Sequence[Placed], intact: Sequence[Path]) -> DatasetInfo:
        """Make the descriptions here, then upload them, the index last."""
        chunks = [p.record for p in placed]
        info = describe(self.work.sources, chunks, self.work.tail, intact)
        staging = self._scratch / "target"
        staging.mkdir()
        copy_tokenizer_of(self.work.sources, staging)
        (staging / MARK).write_text(self.work.fingerprint)
        publish(staging, self.work.fingerprint, info, chunks, self.work.chunk_bytes)
        tokenizer = sorted(f"{TOKENIZER_FOLDER}/{path.name}" for path in (staging / TOKENIZER_FOLDER).iterdir())
        for name in [*tokenizer, CHECKSUMS_FILENAME, METADATA_FILENAME]:
            write_atomic(join(self._target, name), (staging / name).read_bytes())
        remove(join(self._target, MARK))
        write_atomic(join(self._target, INDEX_FILENAME), (staging / INDEX_FILENAME).read_bytes())
        return info


def merge_to_remote(source: str, target: str, level: VerifyLevel) -> tuple[DatasetInfo, Work, list[Placed] | None]:
    """Merge into an object store; the chunks are None when the dataset was complete already.

    Raises:
        DatasetError: As in `merge_datasets`.
        StorageError: As in `merge_datasets`.
    """
    with tempfile.TemporaryDirectory(prefix="pretrainkit-merge-") as scratch:
        merge = RemoteMerge(source, target, level, Path(scratch))
        complete: Any = merge.finished()
        if complete is not None:
            return complete, merge.work, None
        info, placed = merge.run()
        return info, merge.work, placed
