"""litgpt's attention, ready for masks of FlexAttention's kind and for kernels that know grouped queries.

No parameters and no state of its own: an instance of litgpt's class takes one of these instead (`mask_aware`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from pretrainkit.models.architectures import CausalSelfAttention, MultiheadLatentAttention

# FlexAttention's functions, compiled: else they work on the whole score matrix. Filled when the first mask is made, not
# at import, which would cost every CPU run the compiler's start; a plain dictionary: compiled blocks look into it.
flex: dict[str, Callable[..., Any]] = {}


def load_flex() -> None:
    """Fill `flex`."""
    if not flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex["create_block_mask"] = torch.compile(create_block_mask)
        flex["flex_attention"] = torch.compile(flex_attention)


def _soft_cap(cap: float) -> Callable[..., torch.Tensor]:
    """What FlexAttention makes of a scaled score: cap x tanh(score / cap)."""

    def capped(score: torch.Tensor, *_places: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


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
            cap = config.attention_logit_softcapping
            options = {"scale": scale, "enable_gqa": groups > 1, "score_mod": None if cap is None else _soft_cap(cap)}
            y: torch.Tensor = flex["flex_attention"](q, k, v, block_mask=mask, **options)
            return y.transpose(1, 2)
        if groups > 1 and mask is None and config.attention_logit_softcapping is None and v.dtype != torch.float32:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return y.transpose(1, 2)
        if groups > 1:  # with a mask or in fp32 the kernels that know groups are not to be had everywhere
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        result: torch.Tensor = super().scaled_dot_product_attention(q, k, v, mask)  # type: ignore[misc]
        return result


class _SelfAttention(_FlexMixin, CausalSelfAttention):  # type: ignore[misc]
    """Hands queries, keys and values to the kernel as they come out of their projection.

    litgpt repeats keys and values for every query of a group: at 32 queries on 4 groups most of what the attention
    keeps for the backward pass. And its queries change to the order (batch, heads, length, size) in memory; kernels
    write in the order of the queries, so that their result had to be copied into the order of the projection.
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
        if input_pos is not None:
            result: torch.Tensor = super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
            return result
        config = self.config
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
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        y: torch.Tensor = self.proj(self.scaled_dot_product_attention(q, k, v, mask).reshape(batch, length, -1))
        return y

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, heads, length, size) -> the same with rotary positions, halves in the same order in memory.

        The values of litgpt's `apply_rope`, of whose slices and halves the compiler's backward pass makes arrays filled
        up with zeros; this it makes one kernel of.
        """
        width = self.config.rope_n_elem
        half = width // 2
        # (.., length, width) -> (.., length, 2, half): the two of a pair are what one angle turns
        shape = (half, 2) if self.config.rope_interleave else (2, half)
        pairs = torch.unflatten(x[..., :width], -1, shape)
        pairs = pairs.mT if self.config.rope_interleave else pairs
        cos, sin = (torch.unflatten(table, -1, (2, half)).unsqueeze(1) for table in (cos, sin))
        sin = torch.stack((-sin[..., 0, :], sin[..., 1, :]), dim=-2)
        turned = (pairs * cos + pairs.flip(-2) * sin).flatten(-2).to(x.dtype)
        if width == x.shape[-1]:
            return turned
        # Joined with lengths before heads: what is joined is laid out anew.
        return torch.cat((turned.transpose(1, 2), x[..., width:].transpose(1, 2)), dim=-1).transpose(1, 2)


class _LatentAttention(_FlexMixin, MultiheadLatentAttention):  # type: ignore[misc]
    pass


_CLASSES: dict[type, type] = {CausalSelfAttention: _SelfAttention, MultiheadLatentAttention: _LatentAttention}


def mask_aware(attention: torch.nn.Module) -> None:
    """Let litgpt's attention understand FlexAttention's masks, and grouped queries without copies."""
    if type(attention) in _CLASSES:
        attention.__class__ = _CLASSES[type(attention)]
