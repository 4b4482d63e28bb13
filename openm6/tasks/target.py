"""The right side of an instruction as tokens, and those tokens read back.

Plain text on the right is written by the model like everything else: `颜色是[label:colour]，图案是[label:pattern]`.
Two outputs with nothing between them are kept apart by `<|row|>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from openm6.core.tokenizer import Tokenizer
from openm6.tasks.grammar import Part, Slot

SPOKEN = ("text", "label")
"""The slot types that are plain tokens, without marks of their own at their ends."""


def join(side: Sequence[Part], written: Mapping[str, Sequence[int]], tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens of a right side whose slots are written so."""
    if len(side) == 1 and isinstance(side[0], Slot):
        return written[side[0].name]
    ids: list[int] = []
    after_slot = False
    for part in side:
        if isinstance(part, str):
            ids += tokenizer.encode_often(part)
        else:
            if after_slot:
                ids.append(tokenizer.row_id)
            ids += written[part.name]
        after_slot = isinstance(part, Slot)
    return ids


def split(side: Sequence[Part], ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[Slot, list[int]]]:
    """Each slot of a right side with the tokens that are its own, `ids` being what the model wrote.

    A plain text that the model left out is taken as absent: the slot before it then reaches up to the next one.
    """
    left = list(ids)
    if tokenizer.end_id in left:
        left = left[: left.index(tokenizer.end_id)]
    found: list[tuple[Slot, list[int]]] = []
    waiting: Slot | None = None
    for part in side:
        if isinstance(part, Slot):
            if waiting is not None:
                own, left = _cut_at(left, (tokenizer.row_id,), tokenizer)
                found.append((waiting, own))
            waiting = part
            continue
        plain = tokenizer.encode_often(part)
        if waiting is None:  # it stands before the first slot
            left = left[len(plain) :] if tuple(left[: len(plain)]) == plain else left
        elif part is side[-1]:
            left = left[: -len(plain)] if tuple(left[-len(plain) :]) == plain else left
        else:
            own, left = _cut_at(left, plain, tokenizer)
            found.append((waiting, own))
            waiting = None
    if waiting is not None:
        found.append((waiting, left))
    return found


def _cut_at(ids: list[int], mark: tuple[int, ...], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before the first `mark` that is outside of a table, and what after it."""
    inside = False
    for place, token in enumerate(ids):
        inside = token == tokenizer.table_id or (inside and token != tokenizer.table_end_id)
        if not inside and tuple(ids[place : place + len(mark)]) == mark:
            return ids[:place], ids[place + len(mark) :]
    return ids, []
