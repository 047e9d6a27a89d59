"""A tiny dataset whose next token can be learnt, and a tiny model to learn it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index
from pretrainkit.metadata import DatasetInfo, TokenizerInfo

VOCABULARY = 64
DOCUMENT = 100  # tokens

TINY_MODEL = {
    "name": "tiny",
    "block_size": 32,
    "vocab_size": VOCABULARY,
    "padding_multiple": 64,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "intermediate_size": 64,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
    "bias": False,
    "parallel_residual": False,
}


def write_split(folder: Path, split: str, num_tokens: int, seed: int) -> Path:
    """Two chunks of documents of 100 tokens, each ending in 0; each follows from the one before, up to 4 choices."""
    folder.mkdir(parents=True)
    choices = np.random.default_rng(seed).integers(0, 4, num_tokens)
    tokens = np.zeros(num_tokens, np.uint16)
    for i in range(1, num_tokens):
        tokens[i] = (tokens[i - 1] * 5 + choices[i]) % (VOCABULARY - 1) + 1
    tokens[DOCUMENT - 1 :: DOCUMENT] = 0
    entries = []
    for index, part in enumerate(np.split(tokens, 2)):
        name = f"chunk-0-{index}.bin"
        write_chunk(folder / name, part, np.arange(DOCUMENT, len(part) + 1, DOCUMENT))
        entries.append(ChunkEntry(name, (folder / name).stat().st_size, len(part) // DOCUMENT, len(part)))
    write_index(folder, entries, "uint16", 1 << 26, fingerprint=str(seed))
    info = DatasetInfo(
        split=split,
        tokenizer=TokenizerInfo(name="t", sha256="a" * 64, vocab_size=VOCABULARY, eos_id=0),
        token_dtype="uint16",
        boundary="eos",
        documents=num_tokens // DOCUMENT,
        tokens=num_tokens,
        text_bytes=3 * num_tokens,
        chunks=2,
        max_token_id=VOCABULARY - 1,
    )
    (folder / "metadata.json").write_text(info.to_json())
    return folder


@pytest.fixture
def one_thread():
    """PyTorch on one thread: two busy threads on two busy cores wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """DATA as merge writes it: train/ with 1,212 blocks of 32, val/ with 120, tokenizer files beside both."""
    root = tmp_path_factory.mktemp("dataset")
    for split, num_tokens, seed in (("train", 40_000, 1), ("val", 4_000, 2)):
        folder = write_split(root / split, split, num_tokens, seed)
        (folder / "tokenizer").mkdir()
        for path in tokenizer_dir.iterdir():
            (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture
def settings(dataset: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Arguments for a run of 12 steps of 16 blocks; keywords change them, `train=dict(...)` adds to the group."""
    from pretrainkit.config import (
        CheckpointConfig,
        ComputeConfig,
        EvalConfig,
        OptimizerArgs,
        OptimizerConfig,
        TrainConfig,
    )

    def make(**changes: Any) -> dict[str, Any]:
        train = {
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "max_steps": 12,
            "save_interval": 4,
            "lr_warmup_steps": 2,
            "min_lr": 1e-4,
        } | changes.pop("train", {})
        evaluation = {"interval": None, "max_iters": 4, "final_validation": False} | changes.pop("eval", {})
        return {
            "model_config": dict(TINY_MODEL),
            "dataset_path": str(dataset),
            "out_dir": tmp_path / "run",
            "train": TrainConfig(**train),
            "eval": EvalConfig(**evaluation),
            "optimizer": OptimizerConfig(init_args=OptimizerArgs(lr=1e-2)),
            "checkpoint": CheckpointConfig(),
            "compute": ComputeConfig(hang_timeout_s=None),
            "launcher": "local",
            "devices": 1,
        } | changes

    return make


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """Reads a run's metrics.jsonl, one kind of event."""

    def read(run: Path, event: str = "train") -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row for row in parsed if row["event"] == event]

    return read
