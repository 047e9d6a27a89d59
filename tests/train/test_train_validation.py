"""Validation per source, compared with losses that a plain litgpt model gives over every block of each split."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrainkit.config import DataConfig
from pretrainkit.errors import DatasetError, ModelError
from pretrainkit.formats.litdata import read_chunk, read_index, write_index
from pretrainkit.metadata import DatasetInfo
from pretrainkit.train import pretrain
from tests.train.conftest import write_split
from tests.train.test_train_run import weights

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


def change_info(folder: Path, **changes) -> None:
    path = folder / "metadata.json"
    info = DatasetInfo.from_json(path.read_text(), str(path))
    path.write_text(dataclasses.replace(info, **changes).to_json())


@pytest.fixture
def two_sources(tmp_path) -> dict[str, float]:
    """The usual documents at 3 bytes per token with 120 blocks to validate on, and constant text at 5 with 72."""
    for name, num_tokens, seed in (("a", 4000, 1), ("b", 2400, 2)):
        write_split(tmp_path / name / "train", "train", 8000, seed)
        write_split(tmp_path / name / "val", "val", num_tokens, seed + 10)
    for path in (tmp_path / "b").glob("*/chunk-*.bin"):
        tokens, ends = read_chunk(path, "uint16")
        flat = np.where(np.arange(len(tokens)) % 2, 7, np.array(tokens) % 4 + 20).astype("uint16")
        path.write_bytes(path.read_bytes()[: -flat.nbytes] + flat.tobytes())
        assert ends[-1] == len(flat)
    change_info(tmp_path / "b" / "val", text_bytes=5 * 2400)
    return {str(tmp_path / "a"): 3.0, str(tmp_path / "b"): 1.0}


def litgpt_model(final: Path):
    from litgpt import GPT, Config

    model = GPT(Config.from_file(final / "model_config.yaml"))
    stored = {name.removeprefix("model."): value for name, value in weights(final).items() if "model." in name[:6]}
    model.load_state_dict(stored)
    return model.eval()


@torch.no_grad()
def by_hand(model, folder: Path, block_tokens: int = 33) -> tuple[float, int]:
    """Summed cross entropy in nats, and targets, over every whole block of a split, chunk after chunk."""
    nats, targets = 0.0, 0
    for entry in read_index(folder)[0]:
        tokens, _ = read_chunk(folder / entry.filename, "uint16")
        for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
            block = torch.tensor(np.array(tokens[start : start + block_tokens], dtype="int64"))
            logits = model(block[None, :-1])[0]
            nats += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
            targets += block_tokens - 1
    return nats, targets


def test_validation_of_each_source_is_what_a_plain_model_gives_on_its_blocks(settings, rows, two_sources, caplog):
    evaluation = {"interval": 3, "max_iters": 1000, "final_validation": True}
    data = DataConfig(sources=two_sources)
    arguments = settings(dataset_path=None, data=data, eval=evaluation, train={"max_steps": 6})
    with caplog.at_level(logging.INFO):
        pretrain(**arguments)
    validation = rows(arguments["out_dir"], "validation")
    assert [row["step"] for row in validation] == [3, 6]
    assert "no validation data" not in caplog.text

    a, b = two_sources
    model = litgpt_model(arguments["out_dir"] / "final")
    nats_a, targets_a = by_hand(model, Path(a) / "val")
    nats_b, targets_b = by_hand(model, Path(b) / "val")
    assert (targets_a, targets_b) == (120 * 32, 72 * 32)
    assert nats_a / targets_a > nats_b / targets_b + 1.0  # b is far easier
    row = validation[-1]
    # Over all targets, whatever the sources' weights in training are.
    loss = (nats_a + nats_b) / (targets_a + targets_b)
    assert row["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert row["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert row[f"val_loss/{a}/val"] == pytest.approx(nats_a / targets_a, rel=1e-6)
    assert row[f"val_loss/{b}/val"] == pytest.approx(nats_b / targets_b, rel=1e-6)
    bits_a, bits_b = nats_a / math.log(2), nats_b / math.log(2)
    assert row[f"val_bits_per_byte/{a}/val"] == pytest.approx(bits_a / (3 * targets_a), rel=1e-6)
    assert row[f"val_bits_per_byte/{b}/val"] == pytest.approx(bits_b / (5 * targets_b), rel=1e-6)
    together = (bits_a + bits_b) / (3 * targets_a + 5 * targets_b)
    assert row["val_bits_per_byte"] == pytest.approx(together, rel=1e-6)


def test_max_iters_bounds_each_source_and_takes_the_same_blocks_every_time(settings, rows, two_sources):
    arguments = settings(
        dataset_path=None,
        data=DataConfig(sources=two_sources),
        eval={"initial_validation": True, "interval": 1, "max_iters": 3},
        train={"max_steps": 2, "save_interval": None, "min_lr": 0.0, "lr_warmup_steps": 2},
    )
    arguments["optimizer"] = dataclasses.replace(
        arguments["optimizer"], init_args=dataclasses.replace(arguments["optimizer"].init_args, lr=1e-30)
    )
    pretrain(**arguments)
    keys = ["val_loss", *(f"val_loss/{folder}/val" for folder in two_sources)]
    first, second = ([row[key] for key in keys] for row in rows(arguments["out_dir"], "validation"))
    assert first == second  # the model stood still, so any other block would show
    assert first[0] == pytest.approx((first[1] + first[2]) / 2)  # as many blocks of each


def test_a_source_without_a_validation_split_is_named_and_left_out(settings, rows, two_sources, tmp_path, caplog):
    (tmp_path / "b" / "val").rename(tmp_path / "elsewhere")
    arguments = settings(
        dataset_path=None,
        data=DataConfig(sources=two_sources),
        eval={"final_validation": True, "max_iters": 1000},
        train={"max_steps": 1},
    )
    pretrain(**arguments)
    said = [record.getMessage() for record in caplog.records if "validation data" in record.getMessage()]
    assert said == [f"there is no validation data in {tmp_path / 'b'}; training goes without"]
    (row,) = rows(arguments["out_dir"], "validation")
    nats, targets = by_hand(litgpt_model(arguments["out_dir"] / "final"), tmp_path / "a" / "val")
    assert row["val_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert [key for key in row if "/" in key] == []  # one source: its loss is the loss


@pytest.mark.parametrize("empty", ["no chunks", "too short"])
def test_an_empty_validation_split_is_one_line_and_training_goes_on(
    settings, rows, two_sources, tmp_path, caplog, empty
):
    folder = tmp_path / "b" / "val"
    entries, dtype = read_index(folder)
    if empty == "no chunks":
        write_index(folder, [], dtype, 1 << 26)
    else:
        write_index(folder, [dataclasses.replace(entries[0], dim=20)], dtype, 1 << 26)
    arguments = settings(
        dataset_path=None, data=DataConfig(sources=two_sources), eval={"interval": 1}, train={"max_steps": 2}
    )
    pretrain(**arguments)
    tokens = 0 if empty == "no chunks" else 20
    said = [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()]
    (line,) = said
    assert line.startswith(
        f"{folder} holds {tokens} tokens, not one block of 33 for every rank: nothing to validate on"
    )
    assert [row["step"] for row in rows(arguments["out_dir"], "validation")] == [1]


def test_validation_data_that_does_not_fit_is_refused_before_training(settings, two_sources, tmp_path):
    arguments = settings(dataset_path=None, data=DataConfig(sources=two_sources), eval={"final_validation": True})
    change_info(tmp_path / "b" / "val", max_token_id=70)
    with pytest.raises(ModelError, match=r"b/val.* ids reach 70, but tiny has embeddings for 64"):
        pretrain(**arguments)
    info = DatasetInfo.from_json((tmp_path / "a" / "val" / "metadata.json").read_text(), "")
    for name in "ab":  # alike, but not what the training split was made with
        other = dataclasses.replace(info.tokenizer, name="u", sha256="b" * 64)
        change_info(tmp_path / name / "val", tokenizer=other)
    with pytest.raises(DatasetError, match=r"a/val was made with tokenizer 'u' .*a/train with 't'"):
        pretrain(**arguments)
    assert not arguments["out_dir"].exists()
