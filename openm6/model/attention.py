"""Attention under the one mask rule.

Legend of the shape suffixes in this package: B rows, T positions, S positions of the keys, D hidden size,
H query heads, K key/value heads, E width of a head, F width of the feed-forward, V vocabulary, N pictures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model.config import ModelConfig
from openm6.model.norm import RMSNorm, rms_norm
from openm6.model.rotary import Rope, rotate

_flex_compiled: Any = None


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Any) -> Tensor:
    """softmax(q k / sqrt(E) + mask) v, [B, H, T, E].

    The mask decides how: SDPA with an additive tensor or None, FlexAttention with its BlockMask, or the mask's own
    `attend` (PictureMask, those of cpu/attention.py).
    """
    if hasattr(mask, "attend"):
        return mask.attend(q_BHTE, k_BKSE, v_BKSE)  # type: ignore[no-any-return]
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, enable_gqa=grouped)
    from torch.nn.attention.flex_attention import flex_attention

    global _flex_compiled
    if q_BHTE.is_cuda and _flex_compiled is None:
        _flex_compiled = torch.compile(flex_attention)
    run = _flex_compiled if q_BHTE.is_cuda else flex_attention
    return run(q_BHTE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped)


class Attention(nn.Module):
    """Grouped-query self-attention with one fused projection to queries, keys and values.

    `qk_norm` puts an RMSNorm on every query and key head (as Qwen3 does; Chameleon needed it to train stably
    on text and image codes together).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.width, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.width, config.hidden_size, bias=config.bias)
        self.out.writes_to_stream = True  # type: ignore[assignment]  # for the initialization
        self.q_norm = RMSNorm(self.width, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.width, eps=config.norm_eps) if config.qk_norm else None

    def head_scale(self) -> Tensor:
        """The weights of both head norms, [H + K, E]."""
        assert self.q_norm is not None and self.k_norm is not None
        return torch.cat((self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)))

    def norm_heads(self, qk: Tensor) -> Tensor:
        """RMSNorm of every query and key head, [B, T, H + K, E]."""
        return qk if self.q_norm is None else rms_norm(qk, self.head_scale(), self.q_norm.eps)

    def forward(self, x_BTD: Tensor, rope: Rope | None, mask: Any, cache: Any = None, layer: int = 0) -> Tensor:
        rows, length, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(rows, length, -1, self.width)
        # Queries and keys go through norm and rotation together: half the passes over memory.
        qk, v_BTKE = qkv[:, :, : -self.kv_heads], qkv[:, :, -self.kv_heads :]
        qk = self.norm_heads(qk)
        if rope is not None:
            qk = rotate(qk, rope)
        # Norms may widen to fp32; the products run in the precision of the values: the projection's or the cache's.
        qk_BHTE = (qk.to(qkv.dtype) if cache is None else qk).transpose(1, 2)
        q_BHTE, k_BKSE, v_BKSE = qk_BHTE[:, : self.heads], qk_BHTE[:, self.heads :], v_BTKE.transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.update(layer, k_BKSE, v_BKSE)
        y_BHTE = attend(q_BHTE.to(v_BKSE.dtype), k_BKSE.to(v_BKSE.dtype), v_BKSE, mask).to(qkv.dtype)
        return self.out(y_BHTE.transpose(1, 2).reshape(rows, length, -1))
