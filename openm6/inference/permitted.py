"""The tokens that are permitted next, in every way of decoding: constraints, and penalties for repetitions."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openm6.core.sequence import Banned, Sequence, allowed_after

if TYPE_CHECKING:
    from openm6.inference.decoding import Decoding


def permitted(
    logits: Tensor, prompts: Items[Sequence], prefixes: Items[list[int]], decodings: Items[Decoding], end_id: int
) -> Tensor:
    """Penalize repetitions and mask forbidden tokens in logits fp32 [B, V], in place. Row b follows `prefixes[b]`,
    which was generated after `prompts[b]`.

    Tokens that the prefix has are penalized first (CTRL, Keskar et al. 2019, arXiv 1909.05858, section 4.1: positive
    logits divided, negative ones multiplied); then tokens that the constraint forbids, and those that would repeat an
    n-gram, get -inf. Where the constraint leaves nothing else, an n-gram is repeated.
    """
    for row, (written, one) in enumerate(zip(prefixes, decodings, strict=True)):
        if written and one.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(written)), device=logits.device)
            values, penalty = logits[row, seen], one.repetition_penalty
            logits[row, seen] = torch.where(values < 0, values * penalty, values / penalty)
    if any(prompt.constraint is not None for prompt in prompts):
        pairs = zip(prompts, prefixes, strict=True)
        logits = constrain(logits, [allowed_after(prompt, written, end_id) for prompt, written in pairs])
    for row, (written, one) in enumerate(zip(prefixes, decodings, strict=True)):
        if one.no_repeat_ngram_size and (repeating := repeating_tokens(written, one.no_repeat_ngram_size)):
            without = logits[row].index_fill(0, torch.tensor(repeating, device=logits.device), float("-inf"))
            if (without > float("-inf")).any():
                logits[row] = without
    return logits


def repeating_tokens(written: Items[int], size: int) -> list[int]:
    """The tokens that would complete an n-gram of this size that `written` already has."""
    last = list(written[len(written) - size + 1 :]) if size > 1 else []
    starts = range(len(written) - size + 1)
    return sorted({written[n + size - 1] for n in starts if list(written[n : n + size - 1]) == last})


def constrain(logits: Tensor, allowed: list[Items[int] | None]) -> Tensor:
    """Set logits [B, V] to -inf in place, except at the allowed ids of each row. None allows all ids; Banned allows all
    others, and may move the probability of a banned id to another one."""
    for row, ids in enumerate(allowed):
        for banned, other in ids.instead.items() if isinstance(ids, Banned) else ():
            logits[row, other] = torch.logaddexp(logits[row, other], logits[row, banned])
    alike: dict[int, list[int]] = {}  # most rows share one tuple of ids, and are masked at once
    for row, ids in enumerate(allowed):
        if ids is not None:
            alike.setdefault(id(ids), []).append(row)
    for rows in alike.values():
        ids = allowed[rows[0]]
        assert ids is not None
        chosen = torch.as_tensor(list(ids), dtype=torch.int64, device=logits.device)
        if not isinstance(ids, Banned):
            kept = logits[rows][:, chosen]
            logits[rows] = float("-inf")
            logits[torch.tensor(rows)[:, None], chosen] = kept
        elif len(rows) == len(logits):
            logits.index_fill_(1, chosen, float("-inf"))
        elif len(chosen):
            logits[torch.tensor(rows)[:, None], chosen] = float("-inf")
    return logits
