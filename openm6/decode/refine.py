"""A text from a sketch of its source, by edits in parallel (tasks/sketch.py says how they are learned).

One pass over the prompt gives the sketch. Then tokens are counted into its gaps, filled in, and those that do not
belong taken out again, until none does. What is of the sketch is never taken out.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.decode.generate import Generated, check_room
from openm6.decode.steps import Steps, whole
from openm6.model import M6
from openm6.model.attention import Cache
from openm6.sequence import Sequence, by_length, pad
from openm6.tasks.sketch import DROP, modes, skeleton
from openm6.tokenizer import Tokenizer

ROUNDS = 4
"""Times that tokens are inserted at most."""


@dataclass(slots=True)
class _Draft:
    ids: list[int]
    fixed: list[bool]
    done: bool = False


@torch.inference_mode()
def refine_steps(
    model: M6, prompts: Items[Sequence], tokenizer: Tokenizer, most: int, batch_size: int = 64, rounds: int = ROUNDS
) -> Steps[list[Generated]]:
    """The text of every prompt, of `most` tokens at most. What a row gets depends on that row alone."""
    found: dict[int, Generated] = {}
    for chosen in by_length(prompts, batch_size):
        texts = yield from _batch(model, [prompts[i] for i in chosen], tokenizer, most, rounds)
        found |= {i: Generated(ids, 0.0, True) for i, ids in zip(chosen, texts, strict=True)}
    return [found[i] for i in range(len(prompts))]


refine = whole(refine_steps)
"""`refine_steps` from beginning to end."""


def _batch(model: M6, prompts: list[Sequence], tokenizer: Tokenizer, most: int, rounds: int) -> Steps[list[list[int]]]:
    longest = max(len(prompt) for prompt in prompts)
    check_room(model, longest, most + 1)
    device = model.embed.weight.device
    hidden, cache = model.prefill_all(pad(prompts, pad_id=0, even=True).to(device), longest + most + 1)
    asking = _Asking(model, cache, tokenizer, most)
    drafts = [asking.sketch(prompt, row) for prompt, row in zip(prompts, hidden, strict=True)]
    for number in range(rounds):
        if all(draft.done for draft in drafts):
            break
        yield
        asking.insert(drafts, number > 0)
        asking.fill(drafts)
        if number + 1 < rounds:
            asking.delete(drafts)
    return [draft.ids for draft in drafts]


class _Asking:
    """What the network is asked about drafts that stand behind the prompts of a cache."""

    def __init__(self, model: M6, cache: Cache, tokenizer: Tokenizer, most: int):
        self.model, self.cache, self.tokenizer, self.most = model, cache, tokenizer, most
        device = model.embed.weight.device
        self.modes, self.mask = modes(tokenizer), tokenizer.mask_id
        self.classes = torch.tensor(tokenizer.class_ids, device=device)
        # Text alone is written: no special token, no byte of which half a character could stay, no image code.
        plain = [i for i in range(tokenizer.code_start) if not tokenizer.is_part(i)]
        self.words, self.known = torch.tensor(plain, device=device), set(plain)

    def sketch(self, prompt: Sequence, hidden_TD: Tensor) -> _Draft:
        assert prompt.sketch is not None
        places = slice(prompt.sketch.start, prompt.sketch.stop)
        numbers = self.model.logits(hidden_TD[places])[:, self.classes].argmax(-1).tolist()
        kept = [i for i in skeleton(numbers, prompt.ids[places].tolist()) if i in self.known][: self.most]
        return _Draft(kept, [True] * len(kept))

    def insert(self, drafts: list[_Draft], again: bool) -> None:
        """Masks where tokens are missing; a draft that misses none, after the first time, is done."""
        for draft, logits in zip(drafts, self._ask("insert", drafts), strict=True):
            if draft.done:
                continue
            counts = logits[:, self.classes[:DROP]].argmax(-1).tolist()
            room = self.most - len(draft.ids)
            ids, fixed = [], []
            for place, count in enumerate(counts):
                if place:
                    ids.append(draft.ids[place - 1])
                    fixed.append(draft.fixed[place - 1])
                count = min(count, room)
                room -= count
                ids += [self.mask] * count
                fixed += [False] * count
            draft.done = again and self.mask not in ids
            draft.ids, draft.fixed = ids, fixed

    def fill(self, drafts: list[_Draft]) -> None:
        for draft, logits in zip(drafts, self._ask("fill", drafts), strict=True):
            if draft.done or self.mask not in draft.ids:
                continue
            best = self.words[logits[1:, self.words].argmax(-1)].tolist()
            draft.ids = [new if old == self.mask else old for old, new in zip(draft.ids, best, strict=True)]

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
        hidden = self.model.fill(ids.to(device), self.cache, 0, real)
        return [self.model.logits(row[:length]) for row, length in zip(hidden, lengths, strict=True)]
