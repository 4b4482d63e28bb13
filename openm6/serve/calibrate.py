"""Measurements of a model when it is loaded: the number of threads worth using, and whether sampling is reproducible.

A small network loses more by distributing its steps over threads than it gains, especially while the server and other
models use the same cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from openm6.core.batch import pad
from openm6.core.sequence import IGNORE, Sequence
from openm6.model import M6
from openm6.model.cache import prefill, step

WORTH = 1.3
"""Minimum speedup by twice the threads for which they are taken."""
ROWS, PROMPT, STEPS, ROUNDS = 8, 64, 16, 3
LENGTHS, FOLLOWING = (3, 9, 16, 17, 40, 70, 130), 3
"""Lengths of the prompts that are compared, and the number of tokens after each."""


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
    batch, tokens, took = pad(_prompts(model, [length] * ROWS), pad_id=0), torch.arange(ROWS), []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        _, cache = prefill(model, batch, min(positions, length + STEPS))
        for _ in range(min(STEPS, positions - length)):
            step(model, tokens, cache)
        took.append(time.perf_counter() - started)
    return min(took)


@torch.inference_mode()
def is_reproducible(model: M6) -> bool:
    """Whether prompts have bit-identical logits alone and in a batch, so that sampling by a seed gives the same answer.
    False on a GPU, and for kernels that round a row by the rest of the batch (int8 weights) or change the order of its
    sums."""
    if model.embed.weight.device.type != "cpu":
        return False
    room = model.config.max_position_embeddings - FOLLOWING
    prompts = _prompts(model, (min(length, room) for length in LENGTHS))
    together = _logits(model, prompts)
    return all(torch.equal(_logits(model, [one])[0], row) for one, row in zip(prompts, together, strict=True))


def _logits(model: M6, prompts: list[Sequence]) -> Tensor:
    """Logits after the prompts and after each of the tokens that follow, [B, 1 + FOLLOWING, V]."""
    hidden, cache = prefill(model, pad(prompts, pad_id=0, rounded=True), max(map(len, prompts)) + FOLLOWING)
    found = [model.logits(hidden)]
    for token in range(FOLLOWING):
        hidden = step(model, torch.full((len(prompts),), token), cache, reproducible=True)
        found.append(model.logits(hidden))
    return torch.stack(found, 1)


def _prompts(model: M6, lengths: Iterable[int]) -> list[Sequence]:
    """Prompts of random ids, the same ones at each call."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, model.config.vocab_size, length, dtype=np.int32) for length in lengths]
    return [Sequence(one, np.zeros(len(one), np.int32), np.full(len(one), IGNORE, np.int32)) for one in ids]
