"""Texts from a sketch of their source, by edits in parallel (tasks/sketch.py describes how they are trained).

A pass over the prompt selects the pieces of the source that are kept; another one orders them: the sketch. Then the
model predicts how many tokens are missing in each gap, fills them in, and deletes wrong ones, until none is wrong.
Tokens of the sketch are never deleted.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from openm6.core.batch import pad
from openm6.core.sequence import Sequence, SketchTarget
from openm6.core.tokenizer import Tokenizer
from openm6.inference.decoding import Generated, check_room
from openm6.inference.generate import read_text
from openm6.inference.request import Context, Mode, Prepared, text_options
from openm6.inference.steps import Steps, complete, in_batches
from openm6.model import M6
from openm6.model.cache import KVCache, fill, prefill_all
from openm6.tasks.sketch import INSIDE, MOST, joined, kept, modes, ordered
from openm6.tasks.task import Task

ROUNDS = 2
"""Maximum number of rounds of insertions: more change nothing on texts like the trained ones, and a draft with a wrong
sketch would not converge."""
FILLS, CONFIDENT = 4, 0.9
"""Maximum number of passes that fill in inserted tokens, and the probability from which a token is accepted before the
last pass."""


@dataclass(slots=True)
class _Draft:
    ids: list[int]
    fixed: list[bool]
    done: bool = False


def refine_steps(
    model: M6, prompts: Items[Sequence], tokenizer: Tokenizer, most: int, batch_size: int = 64, rounds: int = ROUNDS
) -> Steps[list[Generated]]:
    """The text of every prompt, `most` tokens at most. The result of a row depends on that row alone. A step is a round
    of insertions; it costs a prompt the tokens of its draft."""

    def batch_steps(chosen: list[int]) -> Steps[list[Generated]]:
        return _batch_steps(model, [prompts[i] for i in chosen], tokenizer, most, rounds)

    return in_batches(prompts, batch_size, batch_steps)


refine = complete(refine_steps)
"""`refine_steps` from beginning to end."""


@torch.inference_mode()
def _batch_steps(
    model: M6, prompts: list[Sequence], tokenizer: Tokenizer, most: int, rounds: int
) -> Steps[list[Generated]]:
    longest = max(len(prompt) for prompt in prompts)
    check_room(model, longest, most + 1)
    device = model.embed.weight.device
    hidden, cache = prefill_all(model, pad(prompts, pad_id=0, even=True).to(device), longest + most + 1)
    editor = _Editor(model, cache, tokenizer, most)
    drafts = editor.sketch(prompts, hidden)
    for number in range(rounds):
        if all(draft.done for draft in drafts):
            break
        working = [not draft.done for draft in drafts]
        editor.insert(drafts, number > 0)
        editor.fill(drafts)
        yield [len(draft.ids) * works for draft, works in zip(drafts, working, strict=True)]
        if number + 1 < rounds:
            editor.delete(drafts)
    return [Generated(draft.ids, 0.0, True) for draft in drafts]


class _Editor:
    """Edits drafts, which follow the prompts of a cache, as the network predicts."""

    def __init__(self, model: M6, cache: KVCache, tokenizer: Tokenizer, most: int):
        self.model, self.cache, self.tokenizer, self.most = model, cache, tokenizer, most
        device = model.embed.weight.device
        self.modes, self.mask = modes(tokenizer), tokenizer.mask_id
        self.classes = torch.tensor(tokenizer.class_ids, device=device)
        # Only text is generated: no special token, no byte that could leave half a character, no image code.
        broken = tokenizer.parts.keys() | tokenizer.damaged
        plain = [i for i in range(tokenizer.code_start) if i not in broken and not tokenizer.is_part(i)]
        self.words, self.known = torch.tensor(plain, device=device), set(plain)

    def sketch(self, prompts: list[Sequence], hidden_BTD: Tensor) -> list[_Draft]:
        """Drafts of the kept pieces of each source, in the order of the text."""
        pieces = [self._kept(prompt, hidden) for prompt, hidden in zip(prompts, hidden_BTD, strict=True)]
        shown = [joined(some, self.tokenizer) for some in pieces]
        drafts = []
        read = self._logits("order", [_Draft(draft, []) for draft, _ in shown])
        for some, (_, places), logits in zip(pieces, shown, read, strict=True):
            numbers = logits[places][:, self.classes[: len(some)]].float().log_softmax(-1)
            ids = [token for number in ordered(numbers.cpu().numpy()) for token in some[number]]
            drafts.append(_Draft(ids, [True] * len(ids)))
        return drafts

    def _kept(self, prompt: Sequence, hidden_TD: Tensor) -> list[list[int]]:
        assert isinstance(prompt.target, SketchTarget)
        places = slice(prompt.target.source.start, prompt.target.source.stop)
        logits = self.model.logits(hidden_TD[places])[:, self.classes[: INSIDE + 1]].float()
        pieces = kept(logits.log_softmax(-1).cpu().numpy(), prompt.ids[places].tolist(), self.tokenizer)
        found, room = [], min(self.most, MOST)
        for piece in pieces:
            room -= len(piece) + 1  # with the token that precedes it
            if room >= 0:
                found.append(piece)
        return found

    def insert(self, drafts: list[_Draft], again: bool) -> None:
        """Insert masks where tokens are missing. After the first round (`again`) a draft that misses none is done."""
        for draft, logits in zip(drafts, self._logits("insert", drafts), strict=True):
            if draft.done:
                continue
            counts = logits[:, self.classes].argmax(-1).tolist()
            room = self.most - len(draft.ids)
            ids, fixed = [], []
            for place, count in enumerate(counts):
                if 0 < place < len(draft.ids) and self._within(draft.ids[place - 1 : place + 1]):
                    count = 0
                if place:
                    ids.append(draft.ids[place - 1])
                    fixed.append(draft.fixed[place - 1])
                count = min(count, room)
                room -= count
                ids += [self.mask] * count
                fixed += [False] * count
            draft.done = again and self.mask not in ids
            draft.ids, draft.fixed = ids, fixed

    def _within(self, two: list[int]) -> bool:
        """Whether two neighbours are bytes of one character, between which nothing can stand."""
        return not any(token in self.known for token in two)

    def fill(self, drafts: list[_Draft]) -> None:
        """Replace masks by tokens: confident ones, and the most confident of each gap, first, so that the rest is
        predicted with them. All at once would mix tokens of different wordings."""
        for left in range(FILLS, 0, -1):
            if all(draft.done or self.mask not in draft.ids for draft in drafts):
                break
            for draft, logits in zip(drafts, self._logits("fill", drafts), strict=True):
                if draft.done or self.mask not in draft.ids:
                    continue
                probabilities, best = logits[1:, self.words].float().softmax(-1).max(-1)
                self._settle(draft, probabilities.tolist(), self.words[best].tolist(), CONFIDENT if left > 1 else 0.0)

    def _settle(self, draft: _Draft, probabilities: list[float], best: list[int], threshold: float) -> None:
        gaps = [
            [place for place, _ in gap]
            for mask, gap in groupby(enumerate(draft.ids), lambda at: at[1] == self.mask)
            if mask
        ]
        for gap in gaps:
            likeliest = max(gap, key=probabilities.__getitem__)
            for place in gap:
                if place == likeliest or probabilities[place] >= threshold:
                    draft.ids[place] = best[place]

    def delete(self, drafts: list[_Draft]) -> None:
        """Delete tokens that the network judges wrong; a draft without any is done."""
        yes, no = self.tokenizer.yes_id, self.tokenizer.no_id
        for draft, logits in zip(drafts, self._logits("delete", drafts), strict=True):
            if draft.done:
                continue
            wrong = (logits[1:, yes] > logits[1:, no]).tolist()
            stays = [fixed or not bad for fixed, bad in zip(draft.fixed, wrong, strict=True)]
            draft.done = all(stays)
            draft.ids = [token for token, stay in zip(draft.ids, stays, strict=True) if stay]
            draft.fixed = [fixed for fixed, stay in zip(draft.fixed, stays, strict=True) if stay]

    def _logits(self, kind: str, drafts: list[_Draft]) -> list[Tensor]:
        """Logits [1 + n, V] at the token of the edit `kind` and at the n tokens of each draft."""
        lengths = [1 + len(draft.ids) for draft in drafts]
        width, device = max(lengths), self.classes.device
        ids = torch.zeros(len(drafts), width, dtype=torch.int64)
        for row, draft in enumerate(drafts):
            ids[row, : lengths[row]] = torch.tensor([self.modes[kind], *draft.ids])
        real = None if len(set(lengths)) == 1 else torch.tensor(lengths, device=device)
        hidden = fill(self.model, ids.to(device), self.cache, 0, real)
        return [self.model.logits(row[:length]) for row, length in zip(hidden, lengths, strict=True)]


def _steps(context: Context, task: Task, items: list[Prepared], batch_size: int) -> Steps[list[Generated]]:
    prompts, tokenizer = [item.prompt for item in items], context.processor.tokenizer
    return refine_steps(context.model, prompts, tokenizer, items[0].options.max_new_tokens, batch_size)


SKETCH = Mode(
    "sketch", "text", applies=lambda task, request: bool(task.sketch), options=text_options, steps=_steps,
    read=read_text, batch_key=lambda options, request: options.max_new_tokens,
    kv_shape=lambda context, task, item: (1, len(item.prompt) + item.options.max_new_tokens),
)  # fmt: skip
