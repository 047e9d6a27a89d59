"""The memory of a worker is bounded by its largest document, not by its files; training uses its own again."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_texts

ROOT = Path(__file__).parent.parent
PEAK_OF_WORKERS = """
import resource, sys
from pretrainkit import optimize_dataset
summary = optimize_dataset(*sys.argv[1:], num_workers=1)
print(summary.tokens["train"], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def text_of(megabytes: int, seed: int) -> str:
    """Prose in which words come back, and new ones keep coming."""
    page = "\n".join(make_texts(400))
    pages = -(-megabytes * 1_000_000 // len(page.encode()))
    return "\n".join(f"{page} {seed}-{number}" for number in range(pages))


def peak_bytes(tokenizer_dir: Path, tmp_path: Path) -> int:
    """Peak resident memory of the worker that did the job."""
    command = [sys.executable, "-c", PEAK_OF_WORKERS, tokenizer_dir, tmp_path / "out", tmp_path / "in"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_documents_of_50_mb_pass_within_a_gigabyte(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    texts = [text_of(50, seed) for seed in range(3)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in/huge.parquet")
    assert peak_bytes(tokenizer_dir, tmp_path) < 1e9


@pytest.mark.slow
def test_a_word_of_50_mb_passes_within_a_gigabyte(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    word = "".join(random.Random(0).choices("etaoinshrdlu", k=1_000_000)) * 50
    pq.write_table(pa.table({"text": [word]}), tmp_path / "in/word.parquet")
    assert peak_bytes(tokenizer_dir, tmp_path) < 1e9


@pytest.mark.slow
def test_a_file_larger_than_a_gigabyte_is_streamed(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    texts = pa.array([text_of(1, 0)] * 100)
    with pq.ParquetWriter(tmp_path / "in/large.parquet", pa.schema([("text", pa.string())])) as writer:
        for _ in range(12):
            writer.write_table(pa.table({"text": texts}))
    assert peak_bytes(tokenizer_dir, tmp_path) < 7e8


FAULTS_OF_LATER_STEPS = """
import resource, sys
import numpy as np
from pretrainkit.memory import keep_all_freed_memory
if sys.argv[1] == "keep":
    keep_all_freed_memory()
faults = []
for step in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(100_000_000, np.uint8)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_memory_that_every_step_needs_is_cleared_once():
    """A block above 32 MiB, as a chunk of logits is, that every step needs again."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS_OF_LATER_STEPS, how]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("leave")
