"""The dense feed-forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model.config import ModelConfig


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020; gate and up in one product) or, in the papers' block, GELU; of the width
    `intermediate_size`, or `width`."""

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        width = width or config.intermediate_size
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(config.hidden_size, width * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(width, config.hidden_size, bias=config.bias)
        self.down.writes_to_stream = True  # type: ignore[assignment]  # for the initialization

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down(activate(self.up(x), self.gated))


def activate(x: Tensor, gated: bool) -> Tensor:
    """SwiGLU of gate and up side by side, [..., 2F] to [..., F]; or GELU."""
    if not gated:
        return F.gelu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
