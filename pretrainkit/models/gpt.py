"""litgpt's GPT for training: its modules and state-dict keys, with attention masks of our own and the loss inside.

Comes in: blocks of tokens, (micro_batch, block_size + 1). Goes out: a `LossOutput` of scalars, so that no wrapper ever
copies or converts logits. Guarantee: without a document mask, the loss and its gradients are those of litgpt's GPT;
under autocast but for rounding, since blocks hand on bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pretrainkit.errors import ModelError
from pretrainkit.models.architectures import Config, SketchableGPT
from pretrainkit.models.attention import flex, load_flex, mask_aware
from pretrainkit.models.documents import IGNORED_TARGET, DocumentBoundary, allowed_attention
from pretrainkit.models.loss import linear_cross_entropy
from pretrainkit.models.masters import embed

if TYPE_CHECKING:
    from pretrainkit.config import LossConfig


class LossOutput(NamedTuple):
    """Sums over one micro batch; every field a scalar tensor on the model's device."""

    loss: torch.Tensor
    """Cross entropy + z_loss x z_square, fp32; the only field with gradients."""
    cross_entropy: torch.Tensor
    """Sum of cross entropy in nats, fp32."""
    z_square: torch.Tensor
    """Sum of squared log-partitions, fp32."""
    num_targets: torch.Tensor
    """Positions that counted, int64; all of them unless a document mask leaves out the ones across documents."""


class PretrainGPT(SketchableGPT):
    """litgpt's GPT whose `forward` takes whole blocks and returns their loss.

    Shard it block by block and then the whole (FSDP2's usual order): the loss reads `lm_head.weight` in this module's
    own forward, so the head must belong to the root's group.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: Config,
        *,
        loss: LossConfig,
        tie_embeddings: bool,
        document_boundary: DocumentBoundary | None,
        compile_loss: bool,
    ) -> None:
        super().__init__(config)
        self.tie_embeddings = tie_embeddings
        self.loss_config = loss
        self.document_boundary = document_boundary
        self.compile_loss = compile_loss
        # litgpt builds a sliding window's mask in every layer of every forward, row by row, in place of any mask it is
        # given. Here the mask is made once per forward and handed in, so litgpt's own switch goes off.
        self._windowed = [bool(getattr(block.attn, "apply_sliding_window_attention", False)) for block in self._blocks]
        for block in self._blocks:
            block.attn.apply_sliding_window_attention = False
            mask_aware(block.attn)
        norm: Any = self.transformer.ln_f
        norm_class: Any = type(norm)
        norm.__class__ = _in_own_type(norm_class)
        self.tie_weights()

    @property
    def _blocks(self) -> list[Any]:
        return list(self.transformer.h)

    def tie_weights(self) -> None:
        """Let embedding and head be one parameter again, after something made two of it."""
        if self.tie_embeddings:
            self.transformer.wte.weight = self.lm_head.weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PretrainGPT:
        """Moving or casting keeps the tie, which `to_empty` cuts, and the rotary tables in fp32.

        In bf16 the tables' positions beyond 256 fall together.
        """
        super()._apply(fn, recurse)
        self.tie_weights()
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = self.rope_cache(device=self.cos.device)
        return self

    def forward(self, tokens: torch.Tensor, predict: bool = False) -> LossOutput | torch.Tensor:
        """The loss of predicting each token from those before it.

        Args:
            tokens: (micro_batch, block_size + 1) int64. With `predict`: (batch, length), length <= the context.
            predict: Return the next token's logits after the last position, (batch, vocabulary) fp32, instead.
        """
        if predict:
            last = self._hidden_states(tokens, self._document_ids(tokens), with_kernels=False)[:, -1]
            logits: torch.Tensor = self.lm_head(last).float()
            cap = self.config.final_logit_softcapping
            return logits if cap is None else cap * torch.tanh(logits / cap)

        inputs, targets = (
            tokens[:, :-1],
            tokens[:, 1:],
        )  # (micro_batch, block_size + 1) -> two (micro_batch, block_size)
        document_ids = self._document_ids(tokens)
        if document_ids is not None and self.document_boundary is not None:
            targets = self.document_boundary.mask_targets(targets, document_ids)
            document_ids = document_ids[:, :-1]
        hidden = self._hidden_states(inputs, document_ids)
        loss, cross_entropy, z_square = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            self.lm_head.bias,
            targets.flatten(),
            z_loss=self.loss_config.z_loss,
            softcap=self.config.final_logit_softcapping,
            chunk_tokens=self.loss_config.chunk_tokens,
            fused=self.compile_loss,
        )
        return LossOutput(loss, cross_entropy, z_square, (targets != IGNORED_TARGET).sum())

    def _document_ids(self, tokens: torch.Tensor) -> torch.Tensor | None:
        return None if self.document_boundary is None else self.document_boundary.document_ids(tokens)

    def _hidden_states(
        self, inputs: torch.Tensor, document_ids: torch.Tensor | None, *, with_kernels: bool = True
    ) -> torch.Tensor:
        """(batch, length) ids -> (batch, length, n_embd), after the last norm.

        Without kernels masks are plain matrices: for a few samples, whose lengths would each be compiled.

        Source: litgpt model.py GPT.forward, whose training path returns logits and takes no mask.
        """
        length = inputs.shape[1]
        if length > self.max_seq_length:
            raise ModelError(f"a block of {length} tokens is longer than the model's context of {self.max_seq_length}")
        hidden = self._embed(inputs)
        cos, sin = self.cos[:length].unsqueeze(0), self.sin[:length].unsqueeze(0)
        window = self.config.sliding_window_size
        masks: dict[bool, Any] = {}  # at most two: for layers that see everything, and for those with a window
        for index, (block, is_windowed) in enumerate(zip(self.transformer.h, self._windowed, strict=True)):
            narrow = is_windowed and window is not None and window < length
            if narrow not in masks:
                masks[narrow] = self._mask(inputs, document_ids, window if narrow else None, with_kernels)
            if self.config.rope_indices is None:
                hidden = block(hidden, cos, sin, masks[narrow])
            else:
                table = self.config.rope_indices[index]
                hidden = block(hidden, cos[..., table], sin[..., table], masks[narrow])
        normed: torch.Tensor = self.transformer.ln_f(hidden)
        return normed

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, length) ids -> (batch, length, n_embd), in the type that blocks compute in.

        Autocast leaves embeddings alone: what blocks hand on would stay in fp32, and every norm and sum would move
        twice the bytes. Under FSDP it is bf16 as well.
        """
        hidden = embed(inputs, self.transformer.wte.weight)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if self.config.scale_embeddings:
            hidden = hidden * torch.tensor(self.config.n_embd**0.5, dtype=hidden.dtype)
        return hidden

    def _mask(
        self, inputs: torch.Tensor, document_ids: torch.Tensor | None, window: int | None, with_kernels: bool
    ) -> Any:
        """None for plain causal attention, a FlexAttention block mask on a GPU, else a matrix."""
        soft_capped = self.config.attention_logit_softcapping is not None
        sparse = with_kernels and _has_flex_kernels(inputs.device)
        if document_ids is None and window is None and not (sparse and soft_capped):
            return None
        batch, length = inputs.shape
        if sparse:
            return _block_mask(batch, length, document_ids, window, inputs.device)
        allowed = allowed_attention(length, document_ids, window, inputs.device)
        if soft_capped:  # litgpt adds this mask to the scores instead of handing it to PyTorch
            return torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
        return allowed


@functools.cache
def _in_own_type(norm_class: Any) -> type:
    """The same norm, whose result has the type of what it is given: autocast lets PyTorch's own return fp32.

    And one of this module: PyTorch's own, when they are all it is given, the compiler leaves alone.
    """

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = norm_class.forward(self, hidden).to(hidden.dtype)
        return result

    return type(f"Typed{norm_class.__name__}", (norm_class,), {"forward": forward})


def _has_flex_kernels(device: torch.device) -> bool:
    return device.type == "cuda"  # on a CPU FlexAttention has no backward pass


def _block_mask(
    batch: int, length: int, document_ids: torch.Tensor | None, window: int | None, device: torch.device
) -> Any:
    """FlexAttention's sparse form of `allowed_attention`: fully masked tiles are never computed."""

    def allowed(b: Any, _head: Any, query: Any, key: Any) -> Any:
        result = query >= key
        if window is not None:
            result = result & (query - key < window)
        if document_ids is not None:
            result = result & (document_ids[b, query] == document_ids[b, key])
        return result

    load_flex()
    batch_size = batch if document_ids is not None else None
    return flex["create_block_mask"](allowed, batch_size, None, length, length, device=str(device))


def build_model(
    config: Config,
    *,
    loss: LossConfig,
    max_seq_length: int | None,
    tie_embeddings: bool,
    document_boundary: DocumentBoundary | None,
    compile_loss: bool,
) -> PretrainGPT:
    """See `pretrainkit.models.build_model`."""
    if max_seq_length is not None and max_seq_length > config.block_size:
        raise ModelError(
            f"max_seq_length={max_seq_length} is longer than the context of {config.name or 'the model'}, "
            f"{config.block_size}; use at most that, or raise model_config.block_size"
        )
    try:
        model = PretrainGPT(
            config,
            loss=loss,
            tie_embeddings=tie_embeddings,
            document_boundary=document_boundary,
            compile_loss=compile_loss,
        )
    except (ValueError, TypeError, KeyError) as error:  # litgpt looks into nested keys, such as rope_adjustments, here
        raise ModelError(f"model_config cannot be built: {error}") from error
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    return model
