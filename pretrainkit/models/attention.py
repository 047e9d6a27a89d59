"""litgpt's attention, ready for masks of FlexAttention's kind and for kernels that know grouped queries.

No parameters and no state of its own: an instance of litgpt's class takes one of these instead (`mask_aware`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from pretrainkit.models.architectures import (
    CausalSelfAttention,
    MultiheadLatentAttention,
    apply_rope,
    apply_rope_interleave,
)

# FlexAttention's functions, compiled: else they work on the whole score matrix. Filled when the first mask is made, not
# at import, which would cost every CPU run the compiler's start; a plain dictionary: compiled blocks look into it.
flex: dict[str, Callable[..., Any]] = {}


def load_flex() -> None:
    """Fill `flex`."""
    if not flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex["create_block_mask"] = torch.compile(create_block_mask)
        flex["flex_attention"] = torch.compile(flex_attention)


class _FlexMixin:
    """litgpt's attention with one more kind of mask."""

    def scaled_dot_product_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None
    ) -> torch.Tensor:
        config = self.config  # type: ignore[attr-defined]
        width = q.shape[-1]  # head_size, or the query width of latent attention
        scale = self.mscale * self.mscale / math.sqrt(config.attention_scores_scalar or width)  # type: ignore[attr-defined]
        groups = q.shape[1] // k.shape[1]
        if mask is not None and not isinstance(mask, torch.Tensor):
            # Under autocast a norm on queries and keys leaves them in fp32; the kernel wants one type.
            q, k = q.to(v.dtype), k.to(v.dtype)
            y: torch.Tensor = flex["flex_attention"](q, k, v, block_mask=mask, scale=scale, enable_gqa=groups > 1)
            return y.transpose(1, 2)
        if groups > 1 and mask is None and config.attention_logit_softcapping is None and v.dtype != torch.float32:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return y.transpose(1, 2)
        if groups > 1:  # with a mask or in fp32 the kernels that know groups are not to be had everywhere
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        result: torch.Tensor = super().scaled_dot_product_attention(q, k, v, mask)  # type: ignore[misc]
        return result


class _SelfAttention(_FlexMixin, CausalSelfAttention):  # type: ignore[misc]
    """Hands keys and values to the kernel as they are, where litgpt first repeats them for every query of a group.

    At 32 queries on 4 groups that is most of what the attention keeps for the backward pass.
    """

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Any = None,
        input_pos: torch.Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> torch.Tensor:
        """(batch, length, n_embd) -> the same. Source: litgpt model.py, CausalSelfAttention.forward."""
        config = self.config
        if input_pos is not None or config.n_query_groups == config.n_head:
            result: torch.Tensor = super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
            return result
        batch, length, _ = x.shape
        size = config.head_size
        widths = (config.n_head * size, config.n_query_groups * size, config.n_query_groups * size)
        q, k, v = self.qkv(x).split(widths, dim=-1)
        if config.norm_qk and config.norm_qk_type == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        # (batch, length, heads x size) -> (batch, heads, length, size)
        q, k, v = (part.view(batch, length, -1, size).transpose(1, 2) for part in (q, k, v))
        if config.norm_qk and config.norm_qk_type == "default":
            q, k = self.norm_q(q), self.norm_k(k)
        rotate, turned = apply_rope_interleave if config.rope_interleave else apply_rope, config.rope_n_elem
        q = torch.cat((rotate(q[..., :turned], cos, sin), q[..., turned:]), dim=-1)
        k = torch.cat((rotate(k[..., :turned], cos, sin), k[..., turned:]), dim=-1)
        y: torch.Tensor = self.proj(self.scaled_dot_product_attention(q, k, v, mask).reshape(batch, length, -1))
        return y


class _LatentAttention(_FlexMixin, MultiheadLatentAttention):  # type: ignore[misc]
    pass


_CLASSES: dict[type, type] = {CausalSelfAttention: _SelfAttention, MultiheadLatentAttention: _LatentAttention}


def mask_aware(attention: torch.nn.Module) -> None:
    """Let litgpt's attention understand FlexAttention's masks, and grouped queries without copies."""
    if type(attention) in _CLASSES:
        attention.__class__ = _CLASSES[type(attention)]
