"""Autoregressive decoding after a source, with a key/value cache: greedy, sampled, or by beam search.

The result of a row depends on that row alone: its own mask, its own cache length, its own random numbers. On a CPU its
sums are also added up in one order (see PromptMask, RowMask, EVEN_KEYS and LEAST_ROWS), so that an answer, sampled or
not, is the same whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Items
from dataclasses import replace

import torch
from torch import Tensor

from openm6.core.batch import pad
from openm6.core.errors import UsageError
from openm6.core.sequence import Sequence
from openm6.inference.decoding import Decoding, Generated, check_room
from openm6.inference.permitted import permitted
from openm6.inference.pieces import Pieces
from openm6.inference.request import Answer, Context, Mode, Prepared, Request, text_options
from openm6.inference.steps import Steps, complete, in_batches, in_context
from openm6.model import M6
from openm6.model.cache import prefill, step
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task


def generate_steps(
    model: M6,
    prompts: Items[Sequence],
    end_ids: Items[int],
    decoding: Decoding | None = None,
    batch_size: int = 64,
    numbers: Items[int] | None = None,
) -> Steps[list[Generated]]:
    """Continue every prompt (a Sequence that ends where the answer begins). Results in the prompts' order.

    `end_ids` end an answer; a constraint allows the first of them alone. `numbers` select the prompts' random numbers;
    0, 1, ... by default. A step is one token of all beams, or without
    beams a whole batch; it costs a prompt the tokens that were generated, the end token included.
    """
    decoding, numbers = decoding or Decoding(), numbers or range(len(prompts))

    def batch_steps(chosen: list[int]) -> Steps[list[Generated]]:
        group = [prompts[i] for i in chosen]
        if decoding.num_beams > 1:
            return beam_steps(model, group, end_ids, decoding)
        return _batch_steps(model, group, [numbers[i] for i in chosen], end_ids, decoding)

    return in_batches(prompts, batch_size, batch_steps)


generate = complete(generate_steps)
"""`generate_steps` from beginning to end."""


def stream(model: M6, prompt: Sequence, end_ids: Items[int], decoding: Decoding | None = None) -> Iterator[int]:
    """The ids of one answer, each as soon as it is decided. Raises UsageError for beams, which can change until the
    end."""
    decoding = decoding or Decoding()
    if decoding.num_beams > 1:
        raise UsageError("Beam search cannot stream: its first token is decided last. Use num_beams=1.")
    for tokens, _, _ in _tokens(model, [prompt], [0], end_ids, decoding):
        token = int(tokens[0])
        if token not in end_ids:
            yield token


def _batch_steps(
    model: M6, prompts: Items[Sequence], numbers: list[int], end_ids: Items[int], decoding: Decoding
) -> Steps[list[Generated]]:
    ids: list[list[int]] = [[] for _ in prompts]
    scores, finished = [0.0] * len(prompts), [False] * len(prompts)
    for tokens, log_probs, rows in _tokens(model, prompts, numbers, end_ids, decoding):
        for token, log_prob, row in zip(tokens.tolist(), log_probs.tolist(), rows, strict=True):
            scores[row] += log_prob
            if token in end_ids:
                finished[row] = True
            else:
                ids[row].append(token)
    yield [len(row) + ended for row, ended in zip(ids, finished, strict=True)]
    return [Generated(*parts) for parts in zip(ids, scores, finished, strict=True)]


@torch.inference_mode()
def _tokens(
    model: M6, prompts: Items[Sequence], numbers: list[int], end_ids: Items[int], decoding: Decoding
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yields (tokens, log-probabilities, rows) of the rows that have not ended, until all have."""
    longest = max(len(p) for p in prompts)
    check_room(model, longest, decoding.max_new_tokens)
    device = model.embed.weight.device
    hidden, cache = prefill(model, pad(prompts, pad_id=0, rounded=True).to(device), longest + decoding.max_new_tokens)
    rows = list(range(len(prompts)))
    generators = [row_generator(decoding, number) for number in numbers]
    prefixes: list[list[int]] = [[] for _ in prompts]
    for left in range(decoding.max_new_tokens, 0, -1):
        decodings, written = [decoding] * len(rows), [prefixes[row] for row in rows]
        logits = permitted(model.logits(hidden), [prompts[row] for row in rows], written, decodings, end_ids[0])
        tokens, log_probs = select_tokens(logits, decodings, [generators[row] for row in rows])
        yield tokens, log_probs, rows
        running = [i for i, token in enumerate(tokens.tolist()) if token not in end_ids]
        if not running or left == 1:
            return
        for row, token in zip(rows, tokens.tolist(), strict=True):
            prefixes[row].append(token)
        if len(running) < len(rows):
            keep = torch.tensor(running, device=device)
            cache.select(keep)
            tokens, rows = tokens[keep], [rows[i] for i in running]
        hidden = step(model, tokens, cache, reproducible=decoding.temperature > 0)


def row_generator(decoding: Decoding, number: int = 0) -> torch.Generator | None:
    """The random number generator of row `number` of a call; None for greedy decoding."""
    if not decoding.temperature:
        return None
    return torch.Generator().manual_seed(hash((decoding.seed, number)) & 0x7FFFFFFF)


def select_tokens(
    logits: Tensor, decodings: Items[Decoding], generators: Items[torch.Generator | None]
) -> tuple[Tensor, Tensor]:
    """One token for each row, greedy or sampled by the row's own options and generator: logits fp32 [B, V] to ids
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
        draws = torch.cat([torch.rand(1, generator=generators[row]) for row in rows]).to(logits.device)
        tokens[rows] = sample(tempered(logits[rows], temperature), draws, top_k, top_p)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., V] divided by a temperature above 0, the highest shifted to 0. A temperature below the smallest fp32
    number gives the limit: equal logits for the most probable tokens."""
    highest = logits.amax(-1, keepdim=True)
    return (logits - highest) / max(temperature, torch.finfo(torch.float32).tiny)


def sample(logits: Tensor, draws: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Inverse-transform sampling: logits [B, V], uniform draws [B] in [0, 1), to ids int64 [B].

    `top_k` keeps the k most probable tokens; `top_p` then the tokens whose more probable predecessors sum to less than
    p (nucleus sampling, Holtzman et al. 2020, which keeps the token that crosses p).
    """
    probs = logits.softmax(-1)
    ids = None
    if top_k or top_p < 1:  # a picture's codes are sampled without: sorting them took a fifth of a pass
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        probs[:, top_k:] = 0
    if top_p < 1:
        # Renormalized after top-k. Threads would split the sum of one row, but not its running sum.
        probs = probs / probs.cumsum(-1)[:, -1:]
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    heights = probs.cumsum(-1)
    place = torch.searchsorted(heights, draws[:, None] * heights[:, -1:], right=True)
    last = (heights < heights[:, -1:]).sum(-1, keepdim=True)  # the last token with a probability
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def text_steps(context: Context, task: Task, items: list[Prepared], batch_size: int) -> Steps[list[Generated]]:
    """The generated texts of prepared requests that share their options."""
    prompts, numbers = [item.prompt for item in items], [item.number for item in items]
    end_ids = context.processor.tokenizer.end_ids
    return generate_steps(context.model, prompts, end_ids, items[0].options, batch_size, numbers)


def read_text(context: Context, task: Task, generated: Generated) -> Answer:
    """The value of the task's one output, or the dict of its outputs, and the reasoning before it."""
    processor, reasoning = context.processor, ""
    if processor.chat is not None:
        reasoning = processor.chat.split_reasoning(generated.ids, processor.tokenizer)[0]
    return Answer(task.value(generated.ids, processor), generated.finished, reasoning=reasoning)


def pieces_of(processor: Processor, request: Request) -> Pieces:
    """The pieces of a request's text; its reasoning, if any, apart."""
    is_thinking = processor.chat is not None and processor.chat.is_thinking(request.thinking)
    return Pieces(processor.tokenizer, processor.chat if is_thinking else None)


def _pieces(context: Context, task: Task, item: Prepared) -> Iterator[str]:
    pieces = pieces_of(context.processor, item.request)
    tokens = stream(context.model, item.prompt, context.processor.tokenizer.end_ids, item.options)
    for token in in_context(context.precision, tokens):
        if piece := pieces.add(token):
            yield piece
    if piece := pieces.rest():
        yield piece


TEXT = Mode(
    "text", "text", applies=lambda task, request: True, options=text_options, steps=text_steps, read=read_text,
    stream=_pieces, is_exclusive=False,
)  # fmt: skip
BEAM = replace(
    TEXT, name="beam", is_exclusive=True,
    applies=lambda task, request: Decoding.of(**{**task.decode, **request.decoding}).num_beams > 1,
    kv_shape=lambda context, task, item: (item.options.num_beams, len(item.prompt) + item.options.max_new_tokens),
)  # fmt: skip


@torch.inference_mode()
def beam_steps(model: M6, prompts: Items[Sequence], end_ids: Items[int], decoding: Decoding) -> Steps[list[Generated]]:
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
    hidden, cache = prefill(model, pad(prompts, pad_id=0, rounded=True).to(device), longest + decoding.max_new_tokens)
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
        logits = permitted(model.logits(hidden), every, written, [decoding] * len(every), end_ids[0])
        totals = scores[:, :, None] + logits.log_softmax(-1).view(count, width, -1)
        vocabulary = totals.shape[-1]
        best, places = totals.flatten(1).topk(min(2 * width, width * vocabulary), dim=-1)
        parents = torch.arange(count * width, device=device).view(count, width)
        tokens = torch.full((count, width), end_ids[0], device=device)
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
                if token in end_ids:
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
