"""A text from a sketch of its source, by edits in parallel (tasks/sketch.py says how they are learned).

The pass over the prompt says what is kept, one more in which order: the sketch. Then tokens are counted into its gaps,
filled in, and those that do not belong taken out again, until none does. What is of the sketch is never taken out.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from openm6.core.batch import by_length, pad
from openm6.core.sequence import Sequence, SketchTarget
from openm6.core.tokenizer import Tokenizer
from openm6.inference.decoding import Generated, check_room
from openm6.inference.steps import Steps, recounted, whole
from openm6.model import M6
from openm6.model.cache import KVCache, fill, prefill_all
from openm6.tasks.sketch import INSIDE, MOST, joined, kept, modes, ordered

ROUNDS = 2
"""Times that tokens are inserted at most: on texts like those learned more change nothing, and a draft with a wrong
sketch would go round and round."""
FILLS, SURE = 4, 0.9
"""Passes in which what was inserted is filled in at most, and the probability from which a token need not wait."""


@dataclass(slots=True)
class _Draft:
    ids: list[int]
    fixed: list[bool]
    done: bool = False


@torch.inference_mode()
def refine_steps(
    model: M6, prompts: Items[Sequence], tokenizer: Tokenizer, most: int, batch_size: int = 64, rounds: int = ROUNDS
) -> Steps[list[Generated]]:
    """The text of every prompt, of `most` tokens at most. What a row gets depends on that row alone. A round of
    insertions costs a prompt the tokens of its draft."""
    found: dict[int, Generated] = {}

    def spread(chosen: list[int], counts: list[int]) -> list[int]:
        by_number = dict(zip(chosen, counts, strict=True))
        return [by_number.get(i, 0) for i in range(len(prompts))]

    for chosen in by_length(prompts, batch_size):
        steps = _batch(model, [prompts[i] for i in chosen], tokenizer, most, rounds)
        texts = yield from recounted(steps, partial(spread, chosen))
        found |= {i: Generated(ids, 0.0, True) for i, ids in zip(chosen, texts, strict=True)}
    return [found[i] for i in range(len(prompts))]


refine = whole(refine_steps)
"""`refine_steps` from beginning to end."""


def _batch(model: M6, prompts: list[Sequence], tokenizer: Tokenizer, most: int, rounds: int) -> Steps[list[list[int]]]:
    longest = max(len(prompt) for prompt in prompts)
    check_room(model, longest, most + 1)
    device = model.embed.weight.device
    hidden, cache = prefill_all(model, pad(prompts, pad_id=0, even=True).to(device), longest + most + 1)
    asking = _Asking(model, cache, tokenizer, most)
    drafts = asking.sketch(prompts, hidden)
    for number in range(rounds):
        if all(draft.done for draft in drafts):
            break
        working = [not draft.done for draft in drafts]
        asking.insert(drafts, number > 0)
        asking.fill(drafts)
        yield [len(draft.ids) * works for draft, works in zip(drafts, working, strict=True)]
        if number + 1 < rounds:
            asking.delete(drafts)
    return [draft.ids for draft in drafts]


class _Asking:
    """What the network is asked about drafts that stand behind the prompts of a cache."""

    def __init__(self, model: M6, cache: KVCache, tokenizer: Tokenizer, most: int):
        self.model, self.cache, self.tokenizer, self.most = model, cache, tokenizer, most
        device = model.embed.weight.device
        self.modes, self.mask = modes(tokenizer), tokenizer.mask_id
        self.classes = torch.tensor(tokenizer.class_ids, device=device)
        # Text alone is written: no special token, no byte of which half a character could stay, no image code.
        broken = tokenizer.parts.keys() | tokenizer.damaged
        plain = [i for i in range(tokenizer.code_start) if i not in broken and not tokenizer.is_part(i)]
        self.words, self.known = torch.tensor(plain, device=device), set(plain)

    def sketch(self, prompts: list[Sequence], hidden_BTD: Tensor) -> list[_Draft]:
        """What is kept of each source, in the text's order."""
        pieces = [self._kept(prompt, hidden) for prompt, hidden in zip(prompts, hidden_BTD, strict=True)]
        shown = [joined(some, self.tokenizer) for some in pieces]
        drafts = []
        asked = self._ask("order", [_Draft(draft, []) for draft, _ in shown])
        for some, (_, places), logits in zip(pieces, shown, asked, strict=True):
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
            room -= len(piece) + 1  # with the token before it
            if room >= 0:
                found.append(piece)
        return found

    def insert(self, drafts: list[_Draft], again: bool) -> None:
        """Masks where tokens are missing; a draft that misses none, after the first time, is done."""
        for draft, logits in zip(drafts, self._ask("insert", drafts), strict=True):
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
        """Whether nothing can stand between: bytes of a character."""
        return not any(token in self.known for token in two)

    def fill(self, drafts: list[_Draft]) -> None:
        """The tokens behind the masks: those that are sure, and the surest of each gap, before the rest, that then sees
        them. All at once, each would have its share of another wording."""
        for left in range(FILLS, 0, -1):
            if all(draft.done or self.mask not in draft.ids for draft in drafts):
                break
            for draft, logits in zip(drafts, self._ask("fill", drafts), strict=True):
                if draft.done or self.mask not in draft.ids:
                    continue
                chances, best = logits[1:, self.words].float().softmax(-1).max(-1)
                self._settle(draft, chances.tolist(), self.words[best].tolist(), SURE if left > 1 else 0.0)

    def _settle(self, draft: _Draft, chances: list[float], best: list[int], sure: float) -> None:
        gaps = [
            [place for place, _ in gap]
            for mask, gap in groupby(enumerate(draft.ids), lambda at: at[1] == self.mask)
            if mask
        ]
        for gap in gaps:
            surest = max(gap, key=chances.__getitem__)
            for place in gap:
                if place == surest or chances[place] >= sure:
                    draft.ids[place] = best[place]

    def delete(self, drafts: list[_Draft]) -> None:
        yes, no = self.tokenizer.yes_id, self.tokenizer.no_id
        for draft, logits in zip(drafts, self._ask("delete", drafts), strict=True):
            if draft.done:
                continue
            wrong = (logits[1:, yes] > logits[1:, no]).tolist()
            stays = [fixed or not bad for fixed, bad in zip(draft.fixed, wrong, strict=True)]
            draft.done = all(stays)
            draft.ids = [token for token, stay in zip(draft.ids, stays, strict=True) if stay]
            draft.fixed = [fixed for fixed, stay in zip(draft.fixed, stays, strict=True) if stay]

    def _ask(self, kind: str, drafts: list[_Draft]) -> list[Tensor]:
        """Logits [1 + n, V] at the mode's token and at each of every draft's n tokens."""
        lengths = [1 + len(draft.ids) for draft in drafts]
        width, device = max(lengths), self.classes.device
        ids = torch.zeros(len(drafts), width, dtype=torch.int64)
        for row, draft in enumerate(drafts):
            ids[row, : lengths[row]] = torch.tensor([self.modes[kind], *draft.ids])
        even = len(set(lengths)) == 1
        real = None if even else torch.tensor(lengths, device=device)
        hidden = fill(self.model, ids.to(device), self.cache, 0, real)
        return [self.model.logits(row[:length]) for row, length in zip(hidden, lengths, strict=True)]
