"""Autoregressive decoding after a bidirectional source, with a key/value cache.

What a row gets depends on that row alone: its own mask, its own cache length, its own random numbers. On a CPU its
sums are added up in one order too (see PromptMask, RowMask, EVEN_KEYS and LEAST_ROWS), so that an answer, a sampled one
too, is the same whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Items

import torch
from torch import Tensor

from openm6.core.batch import by_length, pad
from openm6.core.errors import UsageError
from openm6.core.sequence import Sequence
from openm6.inference.decoding import Decoding, Generated, check_room
from openm6.inference.permitted import permitted
from openm6.model import M6
from openm6.model.cache import prefill, step


def generate(
    model: M6,
    prompts: Items[Sequence],
    end_id: int,
    decoding: Decoding | None = None,
    batch_size: int = 64,
    numbers: Items[int] | None = None,
) -> list[Generated]:
    """Continue every prompt (a Sequence that ends where the answer begins). Results in the prompts' order.

    Prompts are batched by length, so that little is padded. `numbers`: of the prompts, for their random numbers;
    0, 1, ... by default.
    """
    decoding, numbers = decoding or Decoding(), numbers or range(len(prompts))
    results: list[Generated | None] = [None] * len(prompts)
    for chosen in by_length(prompts, batch_size):
        group = [prompts[i] for i in chosen]
        if decoding.num_beams > 1:
            from openm6.inference.beam import beam_search

            answers = beam_search(model, group, end_id, decoding)
        else:
            answers = _batch(model, group, [numbers[i] for i in chosen], end_id, decoding)
        for index, answer in zip(chosen, answers, strict=True):
            results[index] = answer
    return [r for r in results if r is not None]


def stream(model: M6, prompt: Sequence, end_id: int, decoding: Decoding | None = None) -> Iterator[int]:
    """The ids of one answer as they are decided (not with beams: a beam may still change its mind)."""
    decoding = decoding or Decoding()
    if decoding.num_beams > 1:
        raise UsageError("Beam search cannot stream: its first token is decided last. Use num_beams=1.")
    for tokens, _, _ in _steps(model, [prompt], [0], end_id, decoding):
        token = int(tokens[0])
        if token != end_id:
            yield token


def _batch(
    model: M6,
    prompts: Items[Sequence],
    numbers: list[int],
    end_id: int,
    decoding: Decoding,
) -> list[Generated]:
    ids: list[list[int]] = [[] for _ in prompts]
    scores, finished = [0.0] * len(prompts), [False] * len(prompts)
    for tokens, log_probs, rows in _steps(model, prompts, numbers, end_id, decoding):
        for token, log_prob, row in zip(tokens.tolist(), log_probs.tolist(), rows, strict=True):
            scores[row] += log_prob
            if token == end_id:
                finished[row] = True
            else:
                ids[row].append(token)
    return [Generated(*parts) for parts in zip(ids, scores, finished, strict=True)]


@torch.inference_mode()
def _steps(
    model: M6,
    prompts: Items[Sequence],
    numbers: list[int],
    end_id: int,
    decoding: Decoding,
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yields (tokens, log-probabilities, rows) of the rows that still run, until all have ended."""
    longest = max(len(p) for p in prompts)
    check_room(model, longest, decoding.max_new_tokens)
    device = model.embed.weight.device
    hidden, cache = prefill(model, pad(prompts, pad_id=0, even=True).to(device), longest + decoding.max_new_tokens)
    rows = list(range(len(prompts)))
    chances = [chance(decoding, number) for number in numbers]
    prefixes: list[list[int]] = [[] for _ in prompts]
    for left in range(decoding.max_new_tokens, 0, -1):
        alike, written = [decoding] * len(rows), [prefixes[row] for row in rows]
        logits = permitted(model.logits(hidden), [prompts[row] for row in rows], written, alike, end_id)
        tokens, log_probs = choose(logits, alike, [chances[row] for row in rows])
        yield tokens, log_probs, rows
        running = [i for i, token in enumerate(tokens.tolist()) if token != end_id]
        if not running or left == 1:
            return
        for row, token in zip(rows, tokens.tolist(), strict=True):
            prefixes[row].append(token)
        if len(running) < len(rows):
            keep = torch.tensor(running, device=device)
            cache.select(keep)
            tokens, rows = tokens[keep], [rows[i] for i in running]
        hidden = step(model, tokens, cache, reproducible=decoding.temperature > 0)


def chance(decoding: Decoding, number: int = 0) -> torch.Generator | None:
    """The random numbers of row `number` of a call; None where nothing is drawn."""
    if not decoding.temperature:
        return None
    return torch.Generator().manual_seed(hash((decoding.seed, number)) & 0x7FFFFFFF)


def choose(logits: Tensor, decodings: Items[Decoding], chances: Items[torch.Generator | None]) -> tuple[Tensor, Tensor]:
    """One token a row, greedily or sampled by the row's own options and random numbers: logits fp32 [B, V] to ids
    int64 [B] and their log-probabilities [B]."""
    log_probs = logits.log_softmax(-1)
    best = log_probs.max(-1)
    alike: dict[tuple[float, int, float], list[int]] = {}
    for row, one in enumerate(decodings):
        if one.temperature:
            alike.setdefault((one.temperature, one.top_k, one.top_p), []).append(row)
    if not alike:
        return best.indices, best.values
    tokens = best.indices.clone()
    for (temperature, top_k, top_p), rows in alike.items():
        draws = torch.cat([torch.rand(1, generator=chances[row]) for row in rows]).to(logits.device)
        tokens[rows] = sample(tempered(logits[rows], temperature), draws, top_k, top_p)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., V] divided by a temperature above 0, the highest brought to 0. A temperature that fp32 cannot hold
    gives the limit: the likeliest tokens stay, alike."""
    highest = logits.amax(-1, keepdim=True)
    return (logits - highest) / max(temperature, torch.finfo(torch.float32).tiny)


def sample(logits: Tensor, draws: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Inverse-transform sampling: logits [B, V], uniform draws [B] in [0, 1), to ids int64 [B].

    With `top_k` or `top_p`, tokens in order of probability; the first k, or those before whose predecessors add up to
    p, stay (nucleus sampling, Holtzman et al. 2020, keeps the token that crosses p).
    """
    probs = logits.softmax(-1)
    ids = None
    if top_k or top_p < 1:  # a picture's codes are sampled without: sorting them took a fifth of a pass
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        probs[:, top_k:] = 0
    if top_p < 1:
        # Of what top-k left, renormalized. Several threads would share out a sum of one row, but not a running one.
        probs = probs / probs.cumsum(-1)[:, -1:]
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    heights = probs.cumsum(-1)
    place = torch.searchsorted(heights, draws[:, None] * heights[:, -1:], right=True)
    last = (heights < heights[:, -1:]).sum(-1, keepdim=True)  # the last that has a probability
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
