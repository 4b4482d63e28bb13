"""The FLOPs of training, and the peak of the machine."""

from __future__ import annotations

import time
from functools import cache

import torch

from openm6.model import ModelConfig
from openm6.model.count import count_parameters


@cache
def peak_flops(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matrix product on this machine, the best of a few runs: the peak of the utilization."""
    size = size or (8192 if device == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        c = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del c
    return 2 * size**3 / best


def training_flops(config: ModelConfig, positions: int, pairs: int, trained: int) -> float:
    """FLOPs of a forward and backward pass: 6 for every weight and position that meet, attention and head apart.
    Of the experts those count that a token sees.

    positions: real ones (no padding). pairs: query-key pairs that the mask allows. trained: positions with a
    label (the only ones that reach the head). The image embedder is left out, so the figure is a little low.
    """
    parts = count_parameters(config)
    seen = parts["experts"] * config.experts_per_token / max(1, config.num_experts)
    weights = parts["attention"] + parts["feed_forward"] + parts["shared_experts"] + parts["router"] + seen
    weights *= config.num_hidden_layers / (config.distinct_layers or config.num_hidden_layers)  # shared, but run again
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return 6.0 * weights * positions + attention + 6.0 * config.vocab_size * config.hidden_size * trained
