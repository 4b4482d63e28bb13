"""One layer of the backbone: attention and feed-forward, each behind a norm, each added to the stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model.attention import Attention
from openm6.model.config import ModelConfig
from openm6.model.norm import make_norm
from openm6.model.packed import PackedLinear, fold


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020; gate and up in one product) or, in the papers' block, GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        inner = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, inner, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.down.writes_to_stream = True  # type: ignore[assignment]  # for the initialization

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = self.up(x_BTD)
        if self.gated:
            gate_BTF, up_BTF = x.chunk(2, dim=-1)
            return self.down(F.silu(gate_BTF) * up_BTF)
        return self.down(F.gelu(x))

    def pack(self, norm: nn.Module, dtype: torch.dtype) -> nn.Module:
        """As `Attention.pack`."""
        norm, self.up = fold(norm, self.up, dtype)  # type: ignore[assignment]
        self.down = PackedLinear(self.down.weight, self.down.bias, dtype)  # type: ignore[assignment]
        return norm


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config, config.hidden_size)
        self.feed_forward = FeedForward(config)

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the weights out for decoding on a CPU."""
        self.attention_norm = self.attention.pack(self.attention_norm, dtype)
        self.feed_forward_norm = self.feed_forward.pack(self.feed_forward_norm, dtype)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Any, write: Any = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, mask, write)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
