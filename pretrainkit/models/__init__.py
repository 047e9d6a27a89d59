"""The models: litgpt's architectures with a training loss inside `forward`, and what a plan needs to know about them.

Comes in: a model's name or its configuration. Goes out: a `torch.nn.Module` with litgpt's own module names and
state-dict keys, whose `forward` maps a block of tokens to a loss. Guarantees: parameters are a pure function of (seed,
parameter name), whatever the world size and sharding; without a document mask the numbers are litgpt's.

This module loads no torch and no litgpt; its functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt import Config
    from torch import nn

    from pretrainkit.config import LossConfig
    from pretrainkit.metadata import DatasetInfo
    from pretrainkit.models.documents import DocumentBoundary
    from pretrainkit.models.facts import ActivationCheckpointing, MemoryFacts

__all__ = [
    "build_model",
    "check_vocabulary",
    "flops_per_token",
    "initialize_parameters",
    "memory_facts",
    "num_parameters",
    "resolve_config",
]


def resolve_config(model_name: str | None, model_config: dict[str, Any] | None = None) -> Config:
    """The litgpt configuration of a model, by its name, by its keys, or by a name with some keys changed.

    Args:
        model_name: A name litgpt knows, such as "pythia-160m" or "meta-llama/Llama-3.2-1B".
        model_config: litgpt `Config` keys; with a name they replace the named model's.

    Raises:
        ModelError: Neither is given, the name is unknown (three nearest names), or a key or value is wrong.
    """
    from pretrainkit.models.configs import resolve_config as resolve

    return resolve(model_name, model_config)


def build_model(
    config: Config,
    *,
    loss: LossConfig,
    max_seq_length: int | None = None,
    tie_embeddings: bool = False,
    document_boundary: DocumentBoundary | None = None,
    compile_loss: bool = False,
) -> nn.Module:
    """The model for training, on the device and with the type that the surrounding context sets (meta included).

    Args:
        config: From `resolve_config`.
        loss: z-loss weight and the loss's chunk size.
        max_seq_length: Context length to train with; None takes the model's own.
        tie_embeddings: Share one matrix between the token embedding and the output head.
        document_boundary: Keeps attention inside documents, whose ends these ids mark; None attends across them.
        compile_loss: Fuse the loss's element-wise part (for GPUs).

    Raises:
        ModelError: The context is longer than the model's, or the combination cannot be built.
    """
    from pretrainkit.models.gpt import build_model as build

    return build(
        config,
        loss=loss,
        max_seq_length=max_seq_length,
        tie_embeddings=tie_embeddings,
        document_boundary=document_boundary,
        compile_loss=compile_loss,
    )


def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place from (seed, its name), each rank its own part, and rebuild the rotary tables.

    The model must be materialised (`to_empty`), and may be sharded: parameters may be DTensors.
    """
    from pretrainkit.models.initialize import initialize_parameters as initialize

    initialize(model, seed)


def check_vocabulary(config: Config, info: DatasetInfo, dataset: str) -> None:
    """Refuse a dataset whose ids the model has no embedding for.

    Raises:
        ModelError: An id of the dataset or its tokenizer is not below the model's padded vocabulary size.
    """
    from pretrainkit.models.configs import check_vocabulary as check

    check(config, info, dataset)


def num_parameters(config: Config, *, tie_embeddings: bool = False) -> int:
    """Parameters of the model, a tied matrix counted once. Built on the meta device: no memory is used."""
    from pretrainkit.models.facts import num_parameters as count

    return count(config, tie_embeddings=tie_embeddings)


def flops_per_token(config: Config, block_size: int) -> tuple[float, float]:
    """Floating point operations of one token's forward and backward pass: (full attention, causal attention).

    6 per weight of every matrix a token passes through (a mixture's chosen experts only), plus attention over
    `block_size` positions; the causal figure counts the half that a causal mask keeps. MFU is usually quoted with the
    full figure.
    """
    from pretrainkit.models.facts import flops_per_token as count

    return count(config, block_size)


def memory_facts(
    config: Config,
    *,
    block_size: int,
    micro_batch_size: int,
    checkpointing: ActivationCheckpointing = "none",
    bytes_per_element: int = 2,
    tie_embeddings: bool = False,
) -> MemoryFacts:
    """What one rank's forward and backward pass keeps in memory, before sharding; see `MemoryFacts`."""
    from pretrainkit.models.facts import memory_facts as facts

    return facts(
        config,
        block_size=block_size,
        micro_batch_size=micro_batch_size,
        checkpointing=checkpointing,
        bytes_per_element=bytes_per_element,
        tie_embeddings=tie_embeddings,
    )
