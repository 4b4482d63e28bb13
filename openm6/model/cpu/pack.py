"""A network whose weights are laid out for the CPU's kernels, with the norms' weights in them.

At one position a layer is some thirty operations of microseconds each, so every one that can be done beforehand
counts: a norm's weight is multiplied into the matrix behind it, and so is the sqrt(D) of its mean square.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from openm6.model.attention import Attention
from openm6.model.block import Block
from openm6.model.changed import Changed, Low
from openm6.model.cpu.norm import length_of
from openm6.model.cpu.packed import Packed, kernel_dtype, packed
from openm6.model.experts import Experts, MixtureOfExperts
from openm6.model.feed_forward import FeedForward, activate
from openm6.model.lowbit import INT4, INT8, kernel_of
from openm6.model.m6 import M6
from openm6.model.norm import RMSNorm


def pack_for_cpu(model: M6, dtype: torch.dtype | None = None) -> M6:
    """Lay the weights of all products out for the CPU's kernels, in place: in bf16 or fp32 (the default is the faster
    one of this CPU), or in int8 or int4 (the default of a network with `weight_bits`).

    Decoding is then 1.6 to 2 times as fast as by transformers (benchmarks/decode.py); the network can no longer be
    trained or saved.
    """
    dtype = dtype or kernel_of(model.config) or kernel_dtype()
    model.packed_head = packed(model.head_weight, None, INT8 if dtype == INT4 else dtype)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention_norm = _pack_attention(block.attention, block.attention_norm, dtype)
        if isinstance(layer := block.feed_forward, MixtureOfExperts):  # its router reads the norm's output too
            layer.experts = PackedExperts(layer.experts, dtype)  # type: ignore[assignment]
            if layer.shared is not None:
                _pack_feed_forward(layer.shared, nn.Identity(), dtype)
        else:
            block.feed_forward_norm = _pack_feed_forward(layer, block.feed_forward_norm, dtype)
    return model


def _pack_attention(attention: Attention, norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Pack in place; returns the module that replaces the norm before."""
    norm, attention.qkv = _fold(norm, attention.qkv, dtype)  # type: ignore[assignment]
    attention.out = _pack(attention.out, dtype)  # type: ignore[assignment]
    if attention.q_norm is not None:
        scale = attention.head_scale().detach() * attention.width**0.5
        heads = partial(_shrink_heads, Shrink(attention.width, attention.q_norm.eps), scale)
        attention.norm_heads = heads  # type: ignore[method-assign]
    return norm


def _shrink_heads(shrink: Shrink, scale: Tensor, qk: Tensor) -> Tensor:
    y: Tensor = shrink(qk) * scale
    return y


def _pack_feed_forward(layer: FeedForward, norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Pack in place; returns the module that replaces the norm before."""
    norm, layer.up = _fold(norm, layer.up, dtype)  # type: ignore[assignment]
    layer.down = _pack(layer.down, dtype)  # type: ignore[assignment]
    return norm


class PackedExperts(nn.Module):
    """The products of `Experts`, one expert after the other."""

    def __init__(self, experts: Experts, dtype: torch.dtype):
        super().__init__()
        self.gated = experts.gated
        self.packed: list[tuple[Packed, Packed]] = [
            (packed(up, None, dtype), packed(down, None, dtype))
            for up, down in zip(experts.up, experts.down, strict=True)
        ]

    def forward(self, rows_SD: Tensor, counts: Tensor) -> Tensor:
        numbers = counts.tolist()
        *parts, rest = rows_SD.split([*numbers, len(rows_SD) - sum(numbers)])
        used = [(part, pair) for part, pair in zip(parts, self.packed, strict=True) if len(part)]
        done = [down(activate(up(part), self.gated)) for part, (up, down) in used]
        return torch.cat([*done, torch.zeros_like(rest, dtype=self.packed[0][0].dtype)])


class Shrink(nn.Module):
    """x / sqrt(|x|^2 + D eps): an RMSNorm without its weight and without sqrt(D)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.least = torch.tensor((width * eps) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / length_of(x, self.least)


def _pack(linear: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(linear, Changed):
        linear.base_layer = _pack(linear.base_layer, dtype)
        return linear
    return packed(linear.weight, linear.bias, dtype)  # type: ignore[arg-type]


def _fold(norm: nn.Module, linear: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A norm and the product behind it, packed; the norm's weight goes into the changes of adapters too."""
    if not isinstance(linear, Changed):
        return _fold_linear(norm, linear, dtype)  # type: ignore[arg-type]
    before, weight = norm, norm.get_parameter("weight")
    norm, linear.base_layer = _fold_linear(norm, linear.base_layer, dtype)  # type: ignore[arg-type]
    if norm is not before:
        for change in linear.changes.values():
            if isinstance(change, Low):
                change.a.data = change.a.data * weight.to(change.a.dtype) * len(weight) ** 0.5
    return norm, linear


def _fold_linear(norm: nn.Module, linear: nn.Linear, dtype: torch.dtype) -> tuple[nn.Module, Packed]:
    """A norm and the product behind it as a pair that gives the same with less to do (a LayerNorm stays: its kernel
    takes its weight along)."""
    if not isinstance(norm, RMSNorm):
        return norm, packed(linear.weight, linear.bias, dtype)
    width = norm.weight.shape[0]
    weight = linear.weight.float() * norm.weight.float() * width**0.5
    return Shrink(width, norm.eps), packed(weight, linear.bias, dtype)
