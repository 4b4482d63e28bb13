"""One layer of the backbone: attention and feed-forward (or experts), each behind a norm, each added to the stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from openm6.model.attention import Attention
from openm6.model.config import ModelConfig
from openm6.model.experts import MixtureOfExperts, RouterStatistics
from openm6.model.feed_forward import FeedForward
from openm6.model.norm import make_norm
from openm6.model.rotary import Rope


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config, config.hidden_size)
        sparse = layer in config.expert_layers()
        self.feed_forward = MixtureOfExperts(config) if sparse else FeedForward(config)

    def forward(
        self, x_BTD: Tensor, rope: Rope | None, mask: Any, cache: Any = None, layer: int = 0, real_BT: Any = None
    ) -> tuple[Tensor, RouterStatistics | None]:
        """The stream behind this layer, [B, T, D]. `real_BT` (bool, or None) is False at padding."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, mask, cache, layer)
        inner_BTD = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, MixtureOfExperts):
            y_BTD, statistics = self.feed_forward(inner_BTD, real_BT)
            return x_BTD + y_BTD, statistics
        return x_BTD + self.feed_forward(inner_BTD), None
