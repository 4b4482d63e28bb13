"""Answers that are not written: what the network gives at the end of a prompt, as a vector or through a head."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

from openm6.core.batch import by_length, pad
from openm6.core.errors import UsageError
from openm6.core.sequence import Sequence
from openm6.model import M6
from openm6.tasks.heads import HEADS


@torch.inference_mode()
def vectors(model: M6, prompts: Items[Sequence], pad_id: int, dims: int | None, batch_size: int = 64) -> np.ndarray:
    """The first `dims` numbers (all by default) of the state at each prompt's end, of length 1: fp32 [N, dims]."""
    found = torch.empty(len(prompts), dims or model.config.hidden_size)
    for chosen in by_length(prompts, batch_size):
        batch = pad([prompts[i] for i in chosen], pad_id, even=True)
        hidden = model(batch.to(model.embed.weight.device)).hidden
        ends = hidden.flatten(0, 1)[batch.ends().to(hidden.device)].float().cpu()
        found[chosen] = torch.nn.functional.normalize(ends[:, :dims], dim=-1)
    return found.numpy()


@torch.inference_mode()
def head_answers(model: M6, prompts: Items[Sequence], pad_id: int, head: str, batch_size: int = 64) -> list[Any]:
    """What a head says of each prompt. Raises UsageError where the model has no such head."""
    if head not in model.heads:
        raise UsageError(f"This model has no head {head}: it was not trained for a task that it answers.")
    found: dict[int, Any] = {}
    for chosen in by_length(prompts, batch_size):
        batch = pad([prompts[i] for i in chosen], pad_id, even=True)
        rows = model(batch.to(model.embed.weight.device)).heads[head].tolist()
        found |= {i: HEADS[head].read(row) for i, row in zip(chosen, rows, strict=True)}
    return [found[i] for i in range(len(prompts))]
