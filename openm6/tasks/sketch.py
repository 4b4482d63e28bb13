"""Sketch and refine (SANA, ACL Findings 2021, arXiv 2105.14778): training of a task whose text keeps much of its
source.

    keep     at every token of the source slot: whether a piece of the text begins there (BEGIN), continues (INSIDE), or
             neither (DROP)
    order    draft of those pieces in the source's order, a mode token before each: the place of each in the text
    insert   draft of tokens: the number of missing tokens after each (and before the first)
    fill     draft with a mask for each missing token: the token
    delete   draft with wrong tokens inserted: which to delete

    source <|answer|> MODE d1 d2 ... dn        positions of the draft see the source and, both ways, each other

Numbers are answered by the tokenizer's `class_ids`, yes and no by its own tokens. The paper's sketch is a pointer
network that writes one token after the other; here one pass selects the pieces, and another, which sees the selection,
orders them. (A single pass cannot: the place of each piece depends on how many others are kept.)"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import pairwise

import numpy as np

from openm6.core.sequence import IGNORE, Sequence, SketchTarget
from openm6.core.tokenizer import HALF, Tokenizer
from openm6.tasks.drawn import BLOCK

DROP, BEGIN, INSIDE = 0, 1, 2

MOST = 255
"""The largest number that can be answered."""

LOST = 0.1
"""Fraction of pieces missing from a draft when order is learned, as some will be missing in use."""

KEPT = 0.7
"""Fraction of pieces that a training draft keeps (the paper's beta), where it is not the sketch itself."""

SHARES = {"order": 0.2, "insert": 0.25, "fill": 0.4, "delete": 0.15}
"""Probabilities of the steps. "keep" is always learned: a source does not see the draft after it."""


def modes(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that begin a draft and name the step."""
    return {
        "order": tokenizer.table_id, "insert": tokenizer.row_id, "fill": tokenizer.mask_id, "delete": tokenizer.cell_id,
    }  # fmt: skip


def matched(source: Items[int], text: str, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The text's tokens, and its runs from the source as (place in the source, place in the text, length), in the
    text's order, without overlap.

    At each place of the text the longest unused run of source tokens is taken that reads as the text continues; runs of
    less than two characters count if they are digits or a whole table cell. Between the runs the text is tokenized by
    itself: tokens of the whole text might reach over their edges."""
    whole = {(cell.start, cell.stop) for cell in cells(source, tokenizer)}
    known = units(source, tokenizer)
    starts: dict[str, list[int]] = {}
    for number, (_, read) in enumerate(known):
        starts.setdefault(read[:1], []).append(number)
    taken = [False] * len(known)
    ids: list[int] = []
    found: list[tuple[int, int, int]] = []
    here = begun = 0  # the text before `begun` has its tokens
    while here < len(text):
        best, chosen = "", range(0)
        for first in starts.get(text[here], []) if len(found) < MOST else []:
            read, last = "", first
            while (
                last < len(known)
                and known[last][1]
                and not taken[last]
                and text.startswith(read + known[last][1], here)
            ):
                read, last = read + known[last][1], last + 1
            if len(read) > len(best):
                best, chosen = read, range(first, last)
        start, stop = (known[chosen[0]][0].start, known[chosen[-1]][0].stop) if chosen else (0, 0)
        if len(best) > 1 or best.isdigit() or (start, stop) in whole:
            ids += tokenizer.encode(text[begun:here])
            found.append((start, len(ids), stop - start))
            ids += source[start:stop]
            for number in chosen:
                taken[number] = True
            here = begun = here + len(best)
        else:
            here += 1
    return [*ids, *tokenizer.encode(text[begun:])], found


def units(source: Items[int], tokenizer: Tokenizer) -> list[tuple[range, str]]:
    """The smallest parts of a source that can be kept, with their text: a token, or the bytes of a character; special
    tokens and invalid bytes have no text."""
    found = []
    place = 0
    while place < len(source):
        end = place + 1
        while HALF in (read := tokenizer.decode_torn(list(source[place:end]))) and end < min(len(source), place + 4):
            end += 1
        if HALF in read:
            end, read = place + 1, ""
        found.append((range(place, end), read))
        place = end
    return found


def cells(source: Items[int], tokenizer: Tokenizer) -> list[range]:
    """Places of the cells of a table; of a text none."""
    edges = {tokenizer.table_id, tokenizer.table_end_id, tokenizer.row_id, tokenizer.cell_id}
    at = [place for place, token in enumerate(source) if token in edges]
    return [range(a + 1, b) for a, b in pairwise(at) if b > a + 1]


def learned(
    prompt: Sequence, answer: str, tokenizer: Tokenizer, rng: np.random.Generator, most: int, kind: str | None = None
) -> Sequence:
    """A training example from a prompt and its answer, of at most `most` tokens: "keep", and one of the other steps."""
    assert isinstance(prompt.target, SketchTarget)
    places = prompt.target.source
    kind = kind or str(rng.choice(list(SHARES), p=list(SHARES.values())))
    source = prompt.ids[places.start : places.stop].tolist()
    text, runs = matched(source, answer, tokenizer)
    text, runs = text[:most], [(there, here, length) for there, here, length in runs if here + length <= most]
    labels = prompt.labels.copy()
    labels[places.start : places.stop] = tokenizer.class_ids[DROP]
    for there, _, length in runs:
        start = places.start + there
        labels[start : start + length] = tokenizer.class_ids[INSIDE]
        labels[start] = tokenizer.class_ids[BEGIN]
    prompt = replace(prompt, labels=labels)
    if kind == "order":
        left = [run for run in runs if rng.random() >= LOST]
        order = sorted(range(len(left)), key=lambda n: left[n][0])  # their numbers are places in the text
        draft, answered = joined([source[left[n][0] : left[n][0] + left[n][2]] for n in order], tokenizer)
        asked = [IGNORE] * (1 + len(draft))
        for place, number in zip(answered, order, strict=True):
            asked[place] = tokenizer.class_ids[number]
        return draft_of(prompt, kind, draft, tokenizer, asked)
    sketch = np.zeros(len(text), bool)
    for _, here, length in runs:
        sketch[here : here + length] = True
    stays = sketch.copy()
    if rng.random() < 0.5:  # else the sketch itself, the first draft in use
        for _, here, length in runs:
            stays[here : here + length] = rng.random() < KEPT
        stays |= ~sketch & (rng.random(len(text)) < rng.random())
    tokens = np.array(text, np.int64)
    if kind == "insert":
        kept = np.flatnonzero(stays)
        gaps = np.diff(np.concatenate(([-1], kept, [len(text)]))) - 1
        answers = [tokenizer.class_ids[min(int(gap), MOST)] for gap in gaps]
        return draft_of(prompt, kind, tokens[kept].tolist(), tokenizer, answers)
    if kind == "fill":
        if stays.all():
            stays[rng.integers(len(text))] = False
        shown = np.where(stays, tokens, tokenizer.mask_id)
        answers = [IGNORE, *np.where(stays, IGNORE, tokens).tolist()]
        return draft_of(prompt, kind, shown.tolist(), tokenizer, answers)
    # Wrong tokens are tokens of the text or the source at wrong places.
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
    """The prompt followed by a draft; `answers`: labels of the mode token and of each token of the draft."""
    added = [modes(tokenizer)[kind], *draft]
    labels = [IGNORE] * len(added) if answers is None else list(answers)
    return replace(
        prompt,
        ids=np.concatenate((prompt.ids, added)).astype(np.int32),
        blocks=np.concatenate((prompt.blocks, [BLOCK] * len(added))).astype(np.int32),
        labels=np.concatenate((prompt.labels, labels)).astype(np.int32),
    )


def kept(log_probs_SC: np.ndarray, source: Items[int], tokenizer: Tokenizer) -> list[list[int]]:
    """The kept pieces of a source, in its order, from log-probabilities [S, 3] of its tokens to be DROP, BEGIN or
    INSIDE. A table cell is kept whole or not at all, by its mean."""
    classes = log_probs_SC.argmax(1)
    for cell in cells(source, tokenizer):
        some = log_probs_SC[cell.start : cell.stop]
        keep = np.logaddexp(some[:, BEGIN], some[:, INSIDE]).mean() > some[:, DROP].mean()
        classes[cell.start : cell.stop] = INSIDE if keep else DROP
        classes[cell.start] = BEGIN if keep else DROP
    for places, read in units(source, tokenizer):
        if not read or classes[places.start] == DROP:
            classes[places.start : places.stop] = DROP
        else:
            classes[places.start + 1 : places.stop] = INSIDE
    found: list[list[int]] = []
    before = DROP
    for number, token in zip(classes, source, strict=True):
        if number == BEGIN or (number == INSIDE and before == DROP):
            found.append([])
        if number != DROP:
            found[-1].append(token)
        before = number
    return found


def joined(pieces: Items[Items[int]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The draft of pieces for the step "order", and the places of its answers, counted from the mode token."""
    mode = modes(tokenizer)["order"]
    draft: list[int] = []
    places: list[int] = []
    for piece in pieces:
        places.append(len(draft))
        draft += [mode, *piece]
    return draft[1:], places


def ordered(log_probs_NM: np.ndarray) -> list[int]:
    """The most probable order of N pieces, from their log-probabilities to be at each of M >= N places."""
    places = assign(-log_probs_NM)
    return sorted(range(len(places)), key=places.__getitem__)


def assign(cost_NM: np.ndarray) -> list[int]:
    """A column of its own for each row of finite costs, M >= N, with the least sum: the Hungarian algorithm by shortest
    augmenting paths, O(N² M)."""
    rows, columns = cost_NM.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)  # the row that has a column
    for row in range(rows):
        distance, before = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, bool)
        current, last = row, -1  # the row that looks for a column, and the column that it would give up
        while True:
            reached = cost_NM[current] - row_price[current] - column_price
            nearer = ~done & (reached < distance)
            distance[nearer], before[nearer] = reached[nearer], last
            last = int(np.where(done, np.inf, distance).argmin())
            step = distance[last]
            row_price[[row, *owner[done]]] += step
            column_price[done] -= step
            distance[~done] -= step
            done[last] = True
            if owner[last] < 0:
                break
            current = owner[last]
        while last >= 0:
            previous = before[last]
            owner[last] = row if previous < 0 else owner[previous]
            last = previous
    return [int(np.flatnonzero(owner == row)[0]) for row in range(rows)]
