"""What the tests share: a tiny real tokenizer and tiny real text, made once per run."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# Every test runs on this machine alone: a library that tries a hub fails at once instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EOS = "<|endoftext|>"
BOS = "<|begin|>"

# Several scripts, white space of many kinds, text that looks like special tokens, an emoji family, a long run.
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "Ein Schiff, das im Hafen liegt, ist sicher; dafür ist es nicht gebaut.",
    "Η γλώσσα είναι το σπίτι.  Два слова.\tТри.",
    "数字は 1234567890 です。",
    f"A document may say {EOS} and {BOS}; that is text.",
    "👩‍👩‍👧‍👦 family, e\u0301 combining, \u00a0no-break, trailing space ",
    "a" * 300,
    "\r\n\r\n  indented\n\n\n\nfar below",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a byte-level BPE of 512 ids, whose last two are BOS and EOS, as `tokenizers` saves it."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny-bpe", vocab_size=512)


def make_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Train a byte-level BPE on SENTENCES and write it the way Hugging Face lays out a tokenizer folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_texts(count: int, seed: int = 0) -> list[str]:
    """`count` different documents of 1 to 12 sentences, the same for the same seed."""
    import random

    generator = random.Random(seed)
    return [f"{i} " + " ".join(generator.choices(SENTENCES, k=generator.randint(1, 12))) for i in range(count)]


def write_parquet(path: Path, texts: list[str | None], row_group_size: int = 64) -> Path:
    """One shard in FineWeb's shape: `text` and `id` columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string()), "id": [f"{path.stem}-{i}" for i in range(len(texts))]})
    pq.write_table(table, path, row_group_size=row_group_size, compression="zstd", write_page_checksum=True)
    return path


@pytest.fixture(scope="session")
def parquet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three shards (one nested) of 500 documents in all; read only."""
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet(folder / "b.parquet", make_texts(200, seed=1))
    write_parquet(folder / "a.parquet", make_texts(100, seed=2))
    write_parquet(folder / "nested" / "c.parquet", make_texts(200, seed=3))
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """The file system of an S3 server on this machine with an empty bucket named `bucket`.

    One for the whole run: s3fs keeps its connections for the life of a process, whatever the environment says later.
    """
    import fsspec
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        file_system = fsspec.filesystem("s3", use_listings_cache=False)
        file_system.mkdir("bucket")
        yield file_system
    server.stop()
