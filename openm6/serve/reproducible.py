"""Whether a sampled answer depends on the rest of its batch, measured when a model is loaded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from openm6.core.batch import pad
from openm6.core.sequence import IGNORE, Sequence
from openm6.model import M6
from openm6.model.cache import prefill, step

LENGTHS, STEPS = (3, 9, 16, 17, 40, 70, 130), 3
"""Lengths of the prompts that are compared, and the number of tokens after each."""


@torch.inference_mode()
def is_reproducible(model: M6) -> bool:
    """Whether prompts have bit-identical logits alone and in a batch, so that sampling by a seed gives the same answer.
    False on a GPU, and for kernels that round a row by the rest of the batch (int8 weights) or change the order of its
    sums."""
    if model.embed.weight.device.type != "cpu":
        return False
    room = model.config.max_position_embeddings - STEPS
    rng = np.random.default_rng(0)
    prompts = [_prompt(rng.integers(0, model.config.vocab_size, min(length, room))) for length in LENGTHS]
    together = _logits(model, prompts)
    return all(torch.equal(_logits(model, [one])[0], row) for one, row in zip(prompts, together, strict=True))


def _prompt(ids: np.ndarray) -> Sequence:
    return Sequence(ids.astype(np.int32), np.zeros(len(ids), np.int32), np.full(len(ids), IGNORE, np.int32))


def _logits(model: M6, prompts: list[Sequence]) -> Tensor:
    """Logits after the prompts and after each of the tokens that follow, [B, 1 + STEPS, V]."""
    hidden, cache = prefill(model, pad(prompts, pad_id=0, even=True), max(map(len, prompts)) + STEPS)
    found = [model.logits(hidden)]
    for token in range(STEPS):
        hidden = step(model, torch.full((len(prompts),), token), cache, reproducible=True)
        found.append(model.logits(hidden))
    return torch.stack(found, 1)
