"""RMSNorm (modern block) or LayerNorm (the papers' block)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from openm6.model.config import ModelConfig


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The normalization that the configuration names, over the last dimension of size `width`."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)
