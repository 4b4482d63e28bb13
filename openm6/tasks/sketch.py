"""Sketch and refine (SANA, ACL Findings 2021, arXiv 2105.14778): what is learned of a task whose text keeps much of
what it is given.

    sketch   at every token of the source slot: the number of its piece of the text (0, 1 ... in the text's order), or
             DROP
    insert   draft of tokens: how many are missing behind each (and before the first)
    fill     draft with a mask for each that is missing: which token stands there
    delete   draft with wrong ones among them: which have to go

    source <|answer|> MODE d1 d2 ... dn        the draft's positions see the source and, both ways, each other

Numbers are answered by the tokenizer's `class_ids`, yes and no by its own tokens. The sketch is a pointer over the
whole source at once; the paper's writes one pointer after the other.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from openm6.sequence import IGNORE, Sequence
from openm6.tasks.drawn import BLOCK
from openm6.tokenizer import Tokenizer

DROP = 255

KEPT = 0.7
"""Share of the pieces that a draft in training still has (the paper's beta), where it is not the sketch itself."""

SHARES = {"sketch": 0.3, "insert": 0.25, "fill": 0.35, "delete": 0.1}
"""How often each is learned."""


def modes(tokenizer: Tokenizer) -> dict[str, int]:
    """The token that begins a draft and says what is asked of it."""
    return {"insert": tokenizer.row_id, "fill": tokenizer.mask_id, "delete": tokenizer.cell_id}


def pieces(source: Items[int], text: Items[int], tokenizer: Tokenizer) -> list[tuple[int, int, int]]:
    """What the text has of the source: (place there, place here, length), in the text's order, none overlapping.

    At each place of the text the longest run of tokens that the source has too, and that is not taken; runs of less
    than two characters count if they are digits.
    """
    starts: dict[int, list[int]] = {}
    for place, token in enumerate(source):
        starts.setdefault(token, []).append(place)
    taken = [False] * len(source)
    found: list[tuple[int, int, int]] = []
    here = 0
    while here < len(text) and len(found) < DROP:
        best = (0, 0)
        for there in starts.get(text[here], []):
            length = 0
            while (
                here + length < len(text)
                and there + length < len(source)
                and text[here + length] == source[there + length]
                and not taken[there + length]
            ):
                length += 1
            best = max(best, (length, -there))
        length, there = best[0], -best[1]
        said = tokenizer.decode(list(text[here : here + length])) if length else ""
        if len(said) > 1 or said.isdigit():
            found.append((there, here, length))
            taken[there : there + length] = [True] * length
            here += length
        else:
            here += 1
    return found


def learned(
    prompt: Sequence, text: Items[int], tokenizer: Tokenizer, rng: np.random.Generator, kind: str | None = None
) -> Sequence:
    """A prompt with its answer `text` as one of the four things that are learned."""
    assert prompt.sketch is not None
    kind = kind or str(rng.choice(list(SHARES), p=list(SHARES.values())))
    source = prompt.ids[prompt.sketch.start : prompt.sketch.stop].tolist()
    runs = pieces(source, text, tokenizer)
    if kind == "sketch":
        labels = prompt.labels.copy()
        labels[prompt.sketch.start : prompt.sketch.stop] = tokenizer.class_ids[DROP]
        for number, (there, _, length) in enumerate(runs):
            start = prompt.sketch.start + there
            labels[start : start + length] = tokenizer.class_ids[number]
        return replace(prompt, labels=labels)
    sketch = np.zeros(len(text), bool)
    for _, here, length in runs:
        sketch[here : here + length] = True
    stays = sketch.copy()
    if rng.random() < 0.5:  # else as the first draft is in use: the sketch
        for _, here, length in runs:
            stays[here : here + length] = rng.random() < KEPT
        stays |= ~sketch & (rng.random(len(text)) < rng.random())
    tokens = np.array(text, np.int64)
    if kind == "insert":
        kept = np.flatnonzero(stays)
        gaps = np.diff(np.concatenate(([-1], kept, [len(text)]))) - 1
        answers = [tokenizer.class_ids[min(int(gap), DROP)] for gap in gaps]
        return draft_of(prompt, kind, tokens[kept].tolist(), tokenizer, answers)
    if kind == "fill":
        if stays.all():
            stays[rng.integers(len(text))] = False
        shown = np.where(stays, tokens, tokenizer.mask_id)
        answers = [IGNORE, *np.where(stays, IGNORE, tokens).tolist()]
        return draft_of(prompt, kind, shown.tolist(), tokenizer, answers)
    # Wrong tokens are those of the text or the source, at places where they do not belong.
    others = [*text, *source]
    shown_, answers = [], [IGNORE]
    for token, own in zip(text, sketch.tolist(), strict=True):
        while rng.random() < 0.1:
            shown_.append(others[int(rng.integers(len(others)))])
            answers.append(tokenizer.yes_id)
        shown_.append(token)
        answers.append(IGNORE if own else tokenizer.no_id)
    return draft_of(prompt, kind, shown_, tokenizer, answers)


def draft_of(
    prompt: Sequence, kind: str, draft: Items[int], tokenizer: Tokenizer, answers: Items[int] | None = None
) -> Sequence:
    """The prompt with a draft behind it; `answers`: the label of the mode's token and of each of the draft's."""
    added = [modes(tokenizer)[kind], *draft]
    labels = [IGNORE] * len(added) if answers is None else list(answers)
    return replace(
        prompt,
        ids=np.concatenate((prompt.ids, added)).astype(np.int32),
        blocks=np.concatenate((prompt.blocks, [BLOCK] * len(added))).astype(np.int32),
        labels=np.concatenate((prompt.labels, labels)).astype(np.int32),
    )


def skeleton(classes: Items[int], source: Items[int]) -> list[int]:
    """The tokens that are kept, piece after piece in the order of their numbers; `classes`: of each source token."""
    order = sorted((number, place) for place, number in enumerate(classes) if number != DROP)
    return [source[place] for _, place in order]
