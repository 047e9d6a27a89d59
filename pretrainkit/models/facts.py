"""What a model costs: parameters, floating point operations, memory. All from its configuration, on the meta device."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from pretrainkit.models.architectures import Config, GroupedTopkRouter, LLaMAMoE, SketchableGPT

ActivationCheckpointing = Literal["none", "attention", "mlp", "block"]


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Sizes of one rank's training state and of one micro batch, in elements or bytes, before any sharding."""

    parameters: int
    """Parameters, a tied matrix once."""
    largest_block_parameters: int
    """Parameters of the largest part that FSDP gathers at a time: a transformer block, or embedding and head."""
    activation_bytes: int
    """Most that is kept for the backward pass of one micro batch under the chosen checkpointing, one block's parts that
    are computed again included."""


def num_parameters(config: Config, *, tie_embeddings: bool = False) -> int:
    """See `pretrainkit.models.num_parameters`."""
    total: int = sum(parameter.numel() for parameter in _meta_model(_key(config)).parameters())
    shared: int = config.padded_vocab_size * config.n_embd if tie_embeddings else 0
    return total - shared


def flops_per_token(config: Config, block_size: int) -> tuple[float, float]:
    """See `pretrainkit.models.flops_per_token`."""
    model = _meta_model(_key(config))
    weights = _weights_met_by_a_token(model, config)
    if config.latent_attention is None:
        widths = 2 * config.n_head * config.head_size  # of the score and of the value product
    else:
        widths = config.n_head * (config.qk_head_dim + config.v_head_dim)
    full = causal = 0.0
    for layer in range(config.n_layer):
        windowed = config.sliding_window_size is not None and config.sliding_window_indices[layer]
        window = min(config.sliding_window_size, block_size) if windowed else block_size
        # A query meets min(position + 1, window) keys; 2 operations each forward, twice that backward.
        mean_keys = (window * (window + 1) / 2 + (block_size - window) * window) / block_size
        full += 6.0 * widths * window
        causal += 6.0 * widths * mean_keys
    return 6.0 * weights + full, 6.0 * weights + causal


def memory_facts(
    config: Config,
    *,
    block_size: int,
    micro_batch_size: int,
    checkpointing: ActivationCheckpointing = "none",
    bytes_per_element: int = 2,
    tie_embeddings: bool = False,
) -> MemoryFacts:
    """See `pretrainkit.models.memory_facts`."""
    model = _meta_model(_key(config))
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer.h]
    ends = (1 if tie_embeddings else 2) * config.padded_vocab_size * config.n_embd
    positions = block_size * micro_batch_size
    kept = _kept_per_position(config, checkpointing)
    # What is computed again lives beside the rest, of one block at a time.
    again = _kept_per_position(config, "none") - kept
    per_position = kept * config.n_layer + again + 4 * config.n_embd
    return MemoryFacts(
        parameters=num_parameters(config, tie_embeddings=tie_embeddings),
        largest_block_parameters=max(*blocks, ends),
        activation_bytes=positions * per_position * bytes_per_element,
    )


def _kept_per_position(config: Config, checkpointing: ActivationCheckpointing) -> int:
    """Elements one block keeps per position for its backward pass, flash attention assumed."""
    width: int = config.n_embd
    if checkpointing == "block":
        return width
    heads: int = config.n_head * config.head_size
    # Norm input and output; q, k, v as projected and as rotated and repeated for every head; the attention's output.
    attention: int = 2 * width + heads + 2 * config.n_query_groups * config.head_size + 4 * heads
    inner: int = config.intermediate_size
    if config.mlp_class_name == "LLaMAMoE":
        inner = (config.moe_intermediate_size or config.intermediate_size) * (
            config.n_expert_per_token + (config.n_shared_expert or 0)
        )
    # Norm input and output; gated: both branches, the activation and the product; plain: before and after it.
    mlp = 2 * width + inner * (2 if config.mlp_class_name == "GptNeoxMLP" else 4)
    return (width if checkpointing == "attention" else attention) + (width if checkpointing == "mlp" else mlp)


def _weights_met_by_a_token(model: nn.Module, config: Config) -> float:
    """Elements of the matrices one token is multiplied with; the embedding is a look-up and counts nothing."""
    total = 0.0
    shares: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, LLaMAMoE):
            for expert in module.experts.modules():
                shares[id(expert)] = config.n_expert_per_token / config.n_expert
        if isinstance(module, (nn.Linear, GroupedTopkRouter)):
            total += module.weight.numel() * shares.get(id(module), 1.0)
    return total


def _key(config: Config) -> str:
    return json.dumps(asdict(config), sort_keys=True)


@functools.lru_cache(maxsize=4)
def _meta_model(key: str) -> SketchableGPT:
    with torch.device("meta"):
        return SketchableGPT(Config(**json.loads(key)))
