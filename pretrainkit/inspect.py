"""A look into a dataset: what it holds, and decoded samples with their document boundaries.

Comes in: a folder that optimize, merge or stock litdata wrote. Goes out: text on standard output. Guarantee: nothing is
written to the dataset, and control characters in its text reach the terminal as visible escapes, never as commands.
"""

from __future__ import annotations

import itertools
import random
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrainkit.errors import ConfigError, DatasetError, TokenizerError
from pretrainkit.formats.litdata import INDEX_FILENAME, ChunkEntry, read_chunk, read_index
from pretrainkit.metadata import METADATA_FILENAME, TOKENIZER_FOLDER, DatasetInfo
from pretrainkit.records import ChunkRecord, load_records
from pretrainkit.statistics import counted, histogram_lines, quantile_bounds
from pretrainkit.tokenizers.folder import tokenizer_file
from pretrainkit.verify import CHECKSUMS_FILENAME, VerifyLevel, read_checksums, verify_chunk

Decode = Callable[[list[int]], str]


def inspect_dataset(
    dataset_dir: Path,
    samples: int = 3,
    sample_tokens: int = 128,
    seed: int = 0,
    tokenizer_dir: Path | None = None,
    verify: VerifyLevel | None = None,
) -> None:
    """Print what a dataset holds, and samples of its text with the document boundaries shown.

    Args:
        dataset_dir: Folder with an index.json: one node's output, a merged dataset, or one that litdata wrote.
        samples: Stretches of tokens to decode, from random places.
        sample_tokens: Tokens of each stretch.
        seed: Chooses the places.
        tokenizer_dir: Tokenizer to decode with; by default the copy that lies beside the data.
        verify: Check every chunk against its record first: fast (sizes, offsets) or full (every byte and id).

    Raises:
        DatasetError: The dataset is missing or damaged.
        ConfigError: A number is out of range.

    Example:
        >>> inspect_dataset(Path("DATA/train"), samples=1)
    """
    dataset_dir = Path(dataset_dir)
    if samples < 0 or sample_tokens < 1:
        raise ConfigError(f"samples={samples} and sample_tokens={sample_tokens} must be at least 0 and 1")
    _check_folder(dataset_dir)
    entries, dtype = read_index(dataset_dir)
    info = DatasetInfo.load(dataset_dir) if (dataset_dir / METADATA_FILENAME).is_file() else None
    _say("\n".join([f"{dataset_dir}", *_facts(entries, dtype.name, info)]))
    if verify is not None:
        _say(f"\nverified ({verify}): {counted(_verify(dataset_dir, entries, info, verify), 'chunk')}, as recorded")
    if info is not None and info.document_lengths:
        _say("\ntokens per document")
        _say("\n".join(f"  {line}" for line in histogram_lines(info.document_lengths)))
    entries = [entry for entry in entries if entry.dim]
    if entries and samples:
        decode = _decoder(tokenizer_dir or dataset_dir / TOKENIZER_FOLDER, required=tokenizer_dir is not None)
        for number, place in enumerate(_places(entries, samples, sample_tokens, seed), 1):
            _say(f"\nsample {number} of {samples}: " + _sample(dataset_dir, dtype, place, sample_tokens, info, decode))


def _say(text: str) -> None:
    sys.stdout.write(visible(text) + "\n")


def _check_folder(folder: Path) -> None:
    """Answer the folder above the splits with the folders meant."""
    if (folder / INDEX_FILENAME).is_file() or not folder.is_dir():
        return  # read_index says what is missing
    below = sorted(path.parent for path in [*folder.glob(f"*/{INDEX_FILENAME}"), *folder.glob(f"*/*/{INDEX_FILENAME}")])
    if below:
        raise DatasetError(f"{folder} is no dataset itself; give one of those in it, such as {below[0]}")


def _facts(entries: Sequence[ChunkEntry], dtype: str, info: DatasetInfo | None) -> list[str]:
    tokens, size = sum(e.dim for e in entries), sum(e.chunk_bytes for e in entries)
    rows = [("tokens", f"{tokens:,} of {dtype}, {size / 1e6:,.1f} MB in {counted(len(entries), 'chunk')}")]
    if info is None:
        rows.append(("metadata", f"none ({METADATA_FILENAME} is missing): stock litdata wrote it, or it was lost"))
        return [f"  {name:<11}{text}" for name, text in rows]
    tokenizer, gone = info.tokenizer, sum(info.dropped.values())
    elsewhere = info.documents_in - info.documents - gone  # documents of the other split
    middle, long = (quantile_bounds(info.document_lengths, q) for q in (0.5, 0.99))
    ends = {"bos": "before", "eos": "after", "both": "before and after"}[info.boundary]
    rows += [
        ("documents", f"{info.documents:,} of split {info.split!r}"),
        ("lengths", f"half up to {middle[1]:,} tokens, 99 % up to {long[1]:,}"),
        (
            "text",
            f"{info.text_bytes / 1e6:,.1f} MB of UTF-8, {info.text_bytes / max(1, info.tokens):.2f} bytes per token",
        ),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256[:16]}"),
        ("boundary", f"{info.boundary}, {ends} each document (bos {tokenizer.bos_id}, eos {tokenizer.eos_id})"),
        ("largest id", f"{info.max_token_id:,}"),
        ("rows read", f"{info.documents_in:,} = {info.documents:,} here + {elsewhere:,} elsewhere + {gone:,} dropped"),
        ("dropped", ", ".join(f"{count:,} {reason}" for reason, count in info.dropped.items()) or "nothing"),
        ("units", f"{info.units:,} of {info.units_planned:,} planned"),
    ]
    if info.block_size is not None:
        rows.append(("block size", f"{info.block_size:,} tokens; {info.tail_tokens:,} at the very end fill none"))
    return [f"  {name:<11}{text}" for name, text in rows]


def _verify(folder: Path, entries: Sequence[ChunkEntry], info: DatasetInfo | None, level: VerifyLevel) -> int:
    """Check the index, and every chunk in it, against what was recorded; how many there are."""
    if info is None:
        raise DatasetError(f"{folder} has no {METADATA_FILENAME}, so there is nothing to verify its chunks against")
    records: list[ChunkRecord]
    if (folder / CHECKSUMS_FILENAME).is_file():
        records = read_checksums(folder)[1]
    else:
        records = [chunk for record in load_records(folder) for chunk in record.chunks]
    listed = [(e.filename, e.chunk_bytes, e.chunk_size, e.dim) for e in entries]
    recorded = [(r.filename, r.bytes, r.items, r.tokens) for r in records]
    for index_says, records_say in itertools.zip_longest(listed, recorded):
        if index_says != records_say:  # readers go by the index
            name = (index_says or records_say)[0]
            raise DatasetError(
                f"{folder}: {INDEX_FILENAME} and what was recorded disagree on {name}; one of them is damaged or was "
                "changed by hand, make the dataset again"
            )
    for record in records:
        verify_chunk(folder / record.filename, record, info.token_dtype, info.tokenizer.vocab_size, level)
    return len(records)


def _places(entries: Sequence[ChunkEntry], samples: int, length: int, seed: int) -> list[tuple[ChunkEntry, int]]:
    """(chunk, first token) of random stretches, each token as likely as any other."""
    generator = random.Random(seed)  # noqa: S311 - a choice of samples, not a secret
    chosen = generator.choices(entries, weights=[entry.dim for entry in entries], k=samples)
    return [(entry, generator.randrange(max(1, entry.dim - length + 1))) for entry in chosen]


def _sample(
    folder: Path,
    dtype: Any,
    place: tuple[ChunkEntry, int],
    length: int,
    info: DatasetInfo | None,
    decode: Decode | None,
) -> str:
    """One stretch of a chunk, a line of its own for each boundary."""
    entry, start = place
    tokens, _ = read_chunk(folder / entry.filename, dtype)
    ids = [int(i) for i in tokens[start : start + length]]
    title = f"{entry.filename}, tokens {start:,} - {start + len(ids) - 1:,}"
    if decode is None:
        return f"{title}\n{' '.join(map(str, ids))}"
    markers = {}
    if info is not None:
        named = (("bos", info.tokenizer.bos_id), ("eos", info.tokenizer.eos_id))
        markers = {number: name for name, number in named if number is not None and info.boundary in (name, "both")}
    parts: list[str] = []
    text: list[int] = []
    for token in ids:
        if token not in markers:
            text.append(token)
            continue
        if text:
            parts.append(decode(text))
        parts.append(f"----- {markers[token]} ({token}) -----")
        text = []
    if text:
        parts.append(decode(text))
    return "\n".join([title, *parts])


def visible(text: str) -> str:
    """Text with every control character but line ends and tabs written as an escape, so that a terminal obeys none."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else c.encode("unicode_escape").decode()
        for c in text
    )


def _decoder(folder: Path, *, required: bool) -> Decode | None:
    """Ids -> text by the tokenizer in `folder`, or None where there is none."""
    if not folder.is_dir() and not required:
        return None
    kind, path = tokenizer_file(folder)
    if kind == "sentencepiece":
        from pretrainkit.tokenizers.sentencepiece import load_model

        model = load_model(path)
        return lambda ids: str(model.decode(ids))
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise TokenizerError(f"{path} cannot be loaded by tokenizers: {error}; give --tokenizer_dir") from error
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
