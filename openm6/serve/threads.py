"""The number of threads of a model's process, measured when it is loaded.

A small network loses more by distributing its steps over threads than it gains, especially while the server and other
models use the same cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from openm6.core.batch import pad
from openm6.core.sequence import IGNORE, Sequence
from openm6.model import M6
from openm6.model.cache import prefill, step

WORTH = 1.3
"""Minimum speedup by twice the threads for which they are taken."""
ROWS, PROMPT, STEPS, ROUNDS = 8, 64, 16, 3


def fit_threads(model: M6) -> int:
    """Set the number of threads of this process by measuring prefill and decoding on the CPU. Returns the number."""
    most = torch.get_num_threads()
    if model.embed.weight.device.type == "cpu" and most > 1:
        _seconds(model, 1)  # kernels are compiled
        torch.set_num_threads(worthwhile(lambda threads: _seconds(model, threads), most))
    return torch.get_num_threads()


def worthwhile(seconds: Callable[[int], float], most: int) -> int:
    """The number of threads, at most `most`, up to which each doubling speeds the work up by WORTH."""
    threads, took = 1, seconds(1)
    while threads < most:
        more = min(2 * threads, most)
        with_more = seconds(more)
        if took < with_more * WORTH ** math.log2(more / threads):
            break
        threads, took = more, with_more
    return threads


@torch.inference_mode()
def _seconds(model: M6, threads: int) -> float:
    """Seconds of a prefill and some decoding steps, the best of a few rounds."""
    torch.set_num_threads(threads)
    positions = model.config.max_position_embeddings
    length = min(PROMPT, max(1, positions // 2))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (ROWS, length), dtype=np.int32)
    blocks, labels = np.zeros(length, np.int32), np.full(length, IGNORE, np.int32)
    batch = pad([Sequence(row, blocks, labels) for row in ids], pad_id=0)
    tokens = torch.from_numpy(ids[:, 0].astype(np.int64))
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        _, cache = prefill(model, batch, min(positions, length + STEPS))
        for _ in range(min(STEPS, positions - length)):
            step(model, tokens, cache)
        took.append(time.perf_counter() - started)
    return min(took)
