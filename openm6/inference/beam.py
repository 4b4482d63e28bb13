"""Beam search with the cached decoder."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from openm6.core.batch import pad
from openm6.core.sequence import Sequence
from openm6.inference.decoding import Decoding, Generated, check_room
from openm6.inference.permitted import permitted
from openm6.inference.steps import Steps
from openm6.model import M6
from openm6.model.cache import prefill, step


@torch.inference_mode()
def beam_steps(model: M6, prompts: Items[Sequence], end_id: int, decoding: Decoding) -> Steps[list[Generated]]:
    """The best finished beam of every prompt, by log-probability / length ** length_penalty.

    Each prompt keeps `num_beams` open beams. Of the 2 x num_beams best continuations those that end are set
    aside, the others stay open. A prompt is done when no open beam can overtake its num_beams-th best finished one
    at the open beam's present score (the usual early stop), or at max_new_tokens, where open beams count too.
    A step costs a prompt that is not done `num_beams` tokens.
    """
    width, count = decoding.num_beams, len(prompts)
    longest = max(len(p) for p in prompts)
    check_room(model, longest, decoding.max_new_tokens)
    device = model.embed.weight.device
    hidden, cache = prefill(model, pad(prompts, pad_id=0, even=True).to(device), longest + decoding.max_new_tokens)
    rows = torch.arange(count, device=device).repeat_interleave(width)
    cache.select(rows)
    hidden = hidden[rows]
    scores = torch.full((count, width), float("-inf"), device=device)
    scores[:, 0] = 0  # the beams of a prompt are equal at first: one is enough
    beams: list[list[list[int]]] = [[[] for _ in range(width)] for _ in prompts]
    ended: list[list[tuple[float, Generated]]] = [[] for _ in prompts]
    done = [False] * count
    every = [prompt for prompt in prompts for _ in range(width)]

    def final(score: float, length: int) -> float:
        return score / max(length, 1) ** decoding.length_penalty

    for number in range(decoding.max_new_tokens):
        written = [ids for beam in beams for ids in beam]
        logits = permitted(model.logits(hidden), every, written, [decoding] * len(every), end_id)
        totals = scores[:, :, None] + logits.log_softmax(-1).view(count, width, -1)
        vocabulary = totals.shape[-1]
        best, places = totals.flatten(1).topk(min(2 * width, width * vocabulary), dim=-1)
        parents = torch.arange(count * width, device=device).view(count, width)
        tokens = torch.full((count, width), end_id, device=device)
        next_scores = torch.full_like(scores, float("-inf"))
        next_beams = [list(b) for b in beams]
        costs = [0 if one else width for one in done]
        for p in range(count):
            if done[p]:
                continue
            open_beams = 0
            for score, place in zip(best[p].tolist(), places[p].tolist(), strict=True):
                if score == float("-inf") or open_beams == width:
                    break
                parent, token = divmod(place, vocabulary)
                ids = beams[p][parent]
                if token == end_id:
                    ended[p].append((final(score, len(ids) + 1), Generated(ids, score, True)))
                    continue
                next_beams[p][open_beams] = [*ids, token]
                parents[p, open_beams] = p * width + parent
                tokens[p, open_beams], next_scores[p, open_beams] = token, score
                open_beams += 1
            ended[p] = sorted(ended[p], key=lambda pair: -pair[0])[:width]
            best_open = final(float(next_scores[p].max()), number + 1)
            done[p] = open_beams == 0 or (len(ended[p]) == width and ended[p][-1][0] >= best_open)
        beams, scores = next_beams, next_scores
        yield costs
        if all(done):
            break
        if number + 1 < decoding.max_new_tokens:
            cache.select(parents.flatten())
            hidden = step(model, tokens.flatten(), cache)

    answers = []
    for p in range(count):
        candidates = list(ended[p])
        if not done[p]:
            for score, ids in zip(scores[p].tolist(), beams[p], strict=True):
                if score > float("-inf"):
                    candidates.append((final(score, len(ids)), Generated(ids, score, False)))
        answers.append(max(candidates, key=lambda pair: pair[0])[1])
    return answers
