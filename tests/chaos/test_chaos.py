"""Fifty seeded kills of optimize and merge, and the control that must fail; `make chaos` runs a thousand.

The cases fork, so they run in a process of their own that holds nothing but the package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import oracle
from tests.chaos.control import lost_silently

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_byte_is_the_undisturbed_runs_after_fifty_cases_of_kills():
    result = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--cases=50", "--jobs=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "50 cases, 0 failed" in result.stdout
    for victim in ("merge", "optimize driver", "optimize everything", "optimize worker"):
        assert f"x {victim}" in result.stdout, "a kind of victim was never killed"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_kills_make_stock_litdata_lose_documents_without_a_word():
    result = subprocess.run(
        [sys.executable, "-m", "tests.chaos.control"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert any(lost_silently(outcome) for outcome in outcomes)


def test_the_oracle_notices_every_kind_of_difference(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c", ".lock"):
        (tmp_path / name).write_bytes(name.encode())
    expected = oracle.tree(tmp_path)
    assert sorted(expected) == ["a", "b", "sub/c"]
    (tmp_path / "a").write_bytes(b"A")
    (tmp_path / "b").unlink()
    (tmp_path / "d").write_bytes(b"")
    assert oracle.differences(oracle.tree(tmp_path), expected) == ["missing b", "other bytes in a", "unexpected d"]


def test_the_oracle_notices_a_dataset_that_shows_itself_too_early(tmp_path):
    import numpy as np

    from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index

    write_chunk(tmp_path / "chunk-0-0.bin", np.arange(6, dtype=np.uint16), np.array([2, 6]))
    size = (tmp_path / "chunk-0-0.bin").stat().st_size
    entries = [ChunkEntry("chunk-0-0.bin", size, 2, 6), ChunkEntry("chunk-0-1.bin", size, 2, 6)]
    write_index(tmp_path, entries, "uint16", 64)
    assert oracle.check_visible(tmp_path) == [f"{tmp_path}/chunk-0-1.bin is in the index but not whole"]
    write_index(tmp_path, [ChunkEntry("chunk-0-0.bin", size, 2, 5)], "uint16", 64)
    assert oracle.check_visible(tmp_path) == [f"{tmp_path}/chunk-0-0.bin has other tokens than the index says"]
