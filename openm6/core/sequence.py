"""Sequence: one example, as the network reads it. T positions.

Nothing here, nor in the tasks that make sequences, needs PyTorch. Laid out for the network they are a Batch
(batch.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

IGNORE = -100
"""The label of a position at which nothing is to be predicted."""

SOURCE = 0
CAUSAL = -1


@dataclass(slots=True)
class Picture:
    """A picture inside a Sequence: pixels uint8 [H, W, 3], whose `patches` patches (row by row) fill the
    positions `start` to `start + patches - 1`; or their features, fp32 [rows, columns, D], in the place of pixels."""

    pixels: np.ndarray
    start: int
    patches: int


class Banned(tuple[int, ...]):
    """Ids that may not follow; all others may. `instead`: of some of them the id that takes their probability."""

    instead: Mapping[int, int]

    def __new__(cls, ids: Iterable[int] = (), instead: Mapping[int, int] | None = None) -> Banned:
        banned = super().__new__(cls, ids)
        banned.instead = instead or {}
        return banned


class Constraint(Protocol):
    """Which ids may follow the ids generated so far (a trie over labels, say), or, as `Banned`, which may not."""

    def next(self, prefix: Items[int]) -> Items[int]: ...


@dataclass(slots=True)
class Sequence:
    """One example, T positions.

    ids     int32 [T]   token ids; positions of picture patches hold the id of `<|patch|>`
    blocks  int32 [T]   0 = source (sees the whole source), -1 = causal, > 0 = codes of one picture
    labels  int32 [T]   the token that the output AT this position has to predict, or IGNORE
    pictures            in the order of their patches
    task, origin        names of the task and of the data source, for the losses by task and by source
    codes               the places of a drawn picture's codes, if there is one
    weight              of each of its labels in the loss
    constraint          of a prompt: what may be written after it
    partner             what has to get a near vector (its own last position's), and `negatives`, which must not
    head, values        of an example that a head answers: which, and the numbers that it has to give
    sketch              of a prompt that is answered by a sketch and edits: the places of what is sketched from
    cut                 tokens of the source and the target that were left out, because the example was too long
    group               pairs of one group are not negatives of each other; "" is none
    """

    ids: np.ndarray
    blocks: np.ndarray
    labels: np.ndarray
    pictures: list[Picture] = field(default_factory=list)
    task: str = ""
    origin: str = ""
    codes: range | None = None
    weight: float = 1.0
    constraint: Constraint | None = None
    partner: Sequence | None = None
    negatives: list[Sequence] = field(default_factory=list)
    group: str = ""
    sketch: range | None = None
    head: str = ""
    values: list[float] = field(default_factory=list)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def allowed_after(prompt: Sequence, prefix: list[int], end_id: int) -> Items[int] | None:
    """What its constraint lets follow; None: anything. The end where nothing may."""
    if prompt.constraint is None:
        return None
    found = prompt.constraint.next(prefix)
    return found if len(found) or isinstance(found, Banned) else (end_id,)
