"""A look at the user's own text: a sample for proving an engine, and the estimate of a dry run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from pretrainkit.documents import DocumentBatch, UntrustedShardError, read_range
from pretrainkit.plan import Plan
from pretrainkit.progress import in_words
from pretrainkit.statistics import counted
from pretrainkit.storage import join
from pretrainkit.tokenizers import AUTO
from pretrainkit.tokenizers.auto import choose_engine, load_engine
from pretrainkit.topology import granted_cpus

_SAMPLED_RANGES = 8
_SAMPLE_BYTES_PER_RANGE = 16 << 10
_ESTIMATE_BYTES_PER_RANGE = 1 << 20


def sample_texts(plan: Plan, roots: dict[str, str]) -> list[str]:
    """A few documents from places spread over the input: at most 128 KB, for the reference engine is slow."""
    texts: list[str] = []
    for batch in _sampled_batches(plan, roots):
        budget = _SAMPLE_BYTES_PER_RANGE
        for text in batch.texts:
            value = text.as_py()[:_SAMPLE_BYTES_PER_RANGE]
            texts.append(value)
            budget -= len(value)
            if budget <= 0:
                break
    return texts


def _sampled_batches(plan: Plan, roots: dict[str, str]) -> Iterator[DocumentBatch]:
    """The first batch with text of up to _SAMPLED_RANGES places spread evenly over the input."""
    places = [
        (shard, dataclasses.replace(source, stop=source.start + 1) if source.kind == "row_group" else source)
        for unit in plan.units
        for shard, source in plan.sources(unit)
        if shard.problem is None
    ]
    step = max(1, -(-len(places) // _SAMPLED_RANGES))
    for shard, source in places[::step]:
        with contextlib.suppress(UntrustedShardError):  # whoever does its unit says so
            for batch in read_range(join(roots[shard.split], shard.name), source, plan.settings.text_column):
                if len(batch.texts):
                    yield batch
                    break


def estimate(plan: Plan, roots: dict[str, str], tokenizer_dir: Path, num_workers: int | None) -> list[str]:
    """What a job would read, write and take, in lines for people.

    The tokens are those of a sample times the text; the error is twice the standard error of the sampled places.
    """
    engine = plan.engine
    if engine == AUTO:
        engine = choose_engine(tokenizer_dir, sample_texts(plan, roots))
    encoder = load_engine(engine, tokenizer_dir)
    tokens_per_byte: list[float] = []
    text_bytes, seconds = 0, 0.0
    for batch in _sampled_batches(plan, roots):
        rows = max(1, len(batch.texts) * _ESTIMATE_BYTES_PER_RANGE // max(1, batch.texts.nbytes))
        texts = batch.texts.slice(0, rows)
        start = time.perf_counter()
        encoded = encoder.encode(texts)
        seconds += time.perf_counter() - start
        size = max(1, texts.nbytes)
        tokens_per_byte.append((len(encoded.ids) + len(texts)) / size)
        text_bytes += size
    mean = statistics.fmean(tokens_per_byte) if tokens_per_byte else 0.0
    error = 2 * statistics.stdev(tokens_per_byte) / len(tokens_per_byte) ** 0.5 if len(tokens_per_byte) > 1 else mean
    cpus = granted_cpus(os.environ) if num_workers is None else max(1, num_workers)
    largest = max(unit.text_bytes for unit in plan.units)
    # A worker cannot do less than one unit: the largest bounds the time from below.
    work_s = max(plan.text_bytes / cpus, largest) * (seconds / text_bytes if text_bytes else 0.0)
    rows_known = [shard.rows for shard in plan.shards if shard.rows is not None]
    unknown = "" if len(rows_known) == len(plan.shards) else " and those of the JSON Lines files"
    width = {"uint16": 2, "int32": 4}[plan.token_dtype]
    return [
        f"files: {len(plan.shards):,}, {sum(shard.size for shard in plan.shards):,} bytes",
        f"rows: {sum(rows_known):,}{unknown}",
        f"text: about {plan.text_bytes:,} bytes in {counted(len(plan.units), 'unit')}",
        f"tokens: about {plan.text_bytes * mean:,.0f} +- {plan.text_bytes * error:,.0f}",
        f"output: about {plan.text_bytes * mean * width:,.0f} bytes as {plan.token_dtype}",
        f"time: about {in_words(work_s)} on {cpus} CPUs with engine {engine}",
        f"skew: the largest unit is {largest * len(plan.units) / max(1, plan.text_bytes):.1f} times the mean",
    ]
