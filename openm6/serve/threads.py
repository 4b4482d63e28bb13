"""How many threads a model is worth: measured as it is loaded.

A small network spends more on handing its steps out to threads than it gains, the more so while the server, and other
models, want the same cores.
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
"""Times as fast as with half of them, or threads are left to others."""
ROWS, READ, WRITTEN, ROUNDS = 8, 64, 16, 3


def fit_threads(model: M6) -> int:
    """Measure, on the CPU, what serving does most, and let this process have so many threads. Returns their number."""
    most = torch.get_num_threads()
    if model.embed.weight.device.type == "cpu" and most > 1:
        _seconds(model, 1)  # kernels are made
        torch.set_num_threads(worthwhile(lambda threads: _seconds(model, threads), most))
    return torch.get_num_threads()


def worthwhile(seconds: Callable[[int], float], most: int) -> int:
    """The number of threads, at most `most`, up to which each doubling makes work WORTH times as fast."""
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
    """To read some prompts and write on, the best of a few rounds."""
    torch.set_num_threads(threads)
    positions = model.config.max_position_embeddings
    read = min(READ, max(1, positions // 2))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (ROWS, read), dtype=np.int32)
    blocks, labels = np.zeros(read, np.int32), np.full(read, IGNORE, np.int32)
    batch = pad([Sequence(row, blocks, labels) for row in ids], pad_id=0)
    written = torch.from_numpy(ids[:, 0].astype(np.int64))
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        _, cache = prefill(model, batch, min(positions, read + WRITTEN))
        for _ in range(min(WRITTEN, positions - read)):
            step(model, written, cache)
        took.append(time.perf_counter() - started)
    return min(took)
