"""Validation: the loss on held-out text, per source, in nats and in bits per byte, and what the model says.

Comes in: the model as trained, and one loader per source. Goes out: plain numbers, the same on every rank. Guarantee:
every rank runs the same number of batches; the loss is the mean over all targets of all ranks, not a mean of means.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrainkit.config import PretrainConfig
from pretrainkit.metadata import DatasetInfo
from pretrainkit.models import check_vocabulary
from pretrainkit.storage import join
from pretrainkit.stream import ValidationLoader, build_validation_loader, check_tokenizers, open_sources
from pretrainkit.train.facts import Facts

logger = logging.getLogger(__name__)


def open_validation(config: PretrainConfig, facts: Facts, *, rank: int, world_size: int) -> dict[str, ValidationLoader]:
    """A loader per source with a validation block for every rank, by its folder; rank 0 says which have none.

    Raises:
        DatasetError: A split has ids of another tokenizer.
        ModelError: Its ids go beyond the model's vocabulary.
    """
    opened = open_sources(
        config.sources,
        "val",
        facts.block_size,
        vocabulary=facts.model_config.padded_vocab_size,
        cache_dir=config.data.cache_dir,
        max_cache_bytes=config.data.max_cache_bytes,
    )
    check_tokenizers([*facts.sources, *opened])
    sources = [source for source in opened if source.num_blocks >= world_size]
    for source in opened:
        if source.info is not None:
            check_vocabulary(facts.model_config, source.info, source.folder)
        if rank == 0 and source.num_blocks < world_size:
            logger.warning(
                "%s holds %s tokens, not one block of %d for every rank: nothing to validate on; training goes without",
                source.folder, f"{source.num_tokens:,}", source.block_tokens,
            )  # fmt: skip
    if rank == 0 and len(opened) < len(config.sources):
        present = {source.folder for source in opened}
        missing = [folder for folder in config.sources if join(folder, "val") not in present]
        logger.warning("there is no validation data in %s; training goes without", " and ".join(missing))
    return {
        source.folder: build_validation_loader(
            source,
            micro_batch_size=config.train.micro_batch_size,
            rank=rank,
            world_size=world_size,
            max_iters=config.eval.max_iters,
            pin_memory=torch.cuda.is_available(),
        )
        for source in sources
    }


@torch.no_grad()
def validate(
    model: nn.Module, loaders: Mapping[str, ValidationLoader], device: torch.device, alive: Callable[[], None]
) -> dict[str, float]:
    """Mean loss over all sources, and per source where there are several. Call on every rank.

    Args:
        model: Maps a micro batch to a `LossOutput`.
        loaders: From `open_validation`.
        device: Where the model is.
        alive: Called per batch.

    Returns:
        val_loss, val_perplexity, val_bits_per_byte (where the text's bytes are known), and the first and the last once
        more per source, as "val_loss/FOLDER".
    """
    model.eval()
    sums = torch.zeros(len(loaders), 2, dtype=torch.float64, device=device)  # cross entropy in nats, targets
    for index, loader in enumerate(loaders.values()):
        for batch in loader:
            output = model(batch["tokens"].to(device, non_blocking=True))
            sums[index] += torch.stack([output.cross_entropy, output.num_targets]).double()
            alive()
    model.train()
    if dist.is_initialized():
        dist.all_reduce(sums)
    totals = sums.tolist()
    values = _values([loader.source.info for loader in loaders.values()], totals)
    if len(loaders) > 1:
        for (folder, loader), total in zip(loaders.items(), totals, strict=True):
            for name, value in _values([loader.source.info], [total]).items():
                if name != "val_perplexity":
                    values[f"{name}/{folder}"] = value
    return values


def _values(infos: list[DatasetInfo | None], totals: list[list[float]]) -> dict[str, float]:
    loss = sum(nats for nats, _ in totals) / sum(targets for _, targets in totals)
    values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    if all(info is not None and info.text_bytes and info.tokens for info in infos):
        # Bytes behind the targets, by each split's bytes per token.
        num_bytes = sum(
            targets * info.text_bytes / info.tokens
            for info, (_, targets) in zip(infos, totals, strict=True)
            if info is not None
        )
        values["val_bits_per_byte"] = sum(nats for nats, _ in totals) / math.log(2) / num_bytes
    return values


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer_json: bytes, prompts: list[str], *, max_new_tokens: int, block_size: int, device: Any
) -> dict[str, str]:
    """The model's most likely continuation of each prompt. Call on every rank: sharded models compute together."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    model.eval()
    texts: dict[str, str] = {}
    with _uncompiled():
        for prompt in prompts:
            ids = tokenizer.encode(prompt).ids
            for _ in range(max_new_tokens if ids else 0):
                # The whole text again for every token: a few samples do not pay for a cache of keys and values.
                context = torch.tensor([ids[-block_size:]], device=device)
                ids.append(int(model(context, predict=True)[0].argmax()))
            texts[prompt] = tokenizer.decode(ids)
    model.train()
    return texts


def _uncompiled() -> Any:
    """Leave compiled blocks aside: they would be compiled again for lengths that come once."""
    compiler = sys.modules.get("torch._dynamo")  # nothing is compiled before it is loaded, and loading it takes long
    return contextlib.nullcontext() if compiler is None else torch.compiler.set_stance("force_eager")
