"""Sequence: one example, as the network reads it. T positions.

Neither this module nor the tasks that make sequences need PyTorch. A Batch (batch.py) lays sequences out for the
network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

IGNORE = -100
"""The label of a position at which nothing is to be predicted."""

SOURCE = 0
CAUSAL = -1

SOURCE_BLOCKS = {"bidirectional": SOURCE, "causal": CAUSAL}
"""Ways in which a model reads a source (ModelConfig.source), and the block of the source's positions for each."""


@dataclass(slots=True)
class Picture:
    """A picture inside a Sequence: pixels uint8 [H, W, 3], whose `patches` patches (row by row) fill the
    positions `start` to `start + patches - 1`; or their features, fp32 [rows, columns, D], in the place of pixels."""

    pixels: np.ndarray
    start: int
    patches: int


class Banned(tuple[int, ...]):
    """Ids that may not follow; all others may. `instead` maps some of them to the id that takes their probability."""

    instead: Mapping[int, int]

    def __new__(cls, ids: Iterable[int] = (), instead: Mapping[int, int] | None = None) -> Banned:
        banned = super().__new__(cls, ids)
        banned.instead = instead or {}
        return banned


class Constraint(Protocol):
    """The ids allowed after those generated so far (a trie over labels, say), or the forbidden ones, as `Banned`."""

    def next(self, prefix: Items[int]) -> Items[int]: ...


@dataclass(slots=True)
class TextTarget:
    """The answer to a prompt is text; `constraint` restricts the ids that may be generated, None does not."""

    constraint: Constraint | None = None


@dataclass(slots=True)
class ImageTarget:
    """The answer is a picture, whose codes stand at the positions `codes`; `weight` of each label in the loss."""

    codes: range
    weight: float = 1.0


@dataclass(slots=True)
class SketchTarget:
    """The answer is written by edits of a sketch, taken from the source text at the positions `source`."""

    source: range


@dataclass(slots=True)
class HeadTarget:
    """The answer is the `values` that the head of this name has to give."""

    head: str
    values: list[float]


@dataclass(slots=True)
class ContrastTarget:
    """The vector at the last position is to be near to that of `positive` and far from those of `negatives`.

    Pairs of one `group` are not negatives of each other; "" is no group."""

    positive: Sequence
    negatives: list[Sequence]
    group: str = ""


Target = TextTarget | ImageTarget | SketchTarget | HeadTarget | ContrastTarget


@dataclass(slots=True)
class Sequence:
    """One example, T positions.

    ids     int32 [T]   token ids; positions of picture patches hold the id of `<|patch|>`
    blocks  int32 [T]   0 = source that sees all of itself, -1 = causal, > 0 = codes of one picture, or a draft
    labels  int32 [T]   the token that the output AT this position has to predict, or IGNORE
    pictures            in the order of their patches
    task, origin        names of the task and of the data source, for the losses by task and by source
    truncated           number of tokens of source and target that were left out because the example was too long
    target              what the kind of its answer needs besides labels; None: nothing"""

    ids: np.ndarray
    blocks: np.ndarray
    labels: np.ndarray
    pictures: list[Picture] = field(default_factory=list)
    task: str = ""
    origin: str = ""
    truncated: int = 0
    target: Target | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def extended(self, ids: Items[int], block: int, labels: Items[int] | None = None) -> Sequence:
        """This example with further positions of one block; without `labels` nothing is predicted at them."""
        added = (ids, [block] * len(ids), [IGNORE] * len(ids) if labels is None else labels)
        own = (self.ids, self.blocks, self.labels)
        joined = [np.concatenate((a, np.array(b, np.int32))) for a, b in zip(own, added, strict=True)]
        return replace(self, ids=joined[0], blocks=joined[1], labels=joined[2])

    @property
    def image(self) -> ImageTarget | None:
        """The target of an example whose answer is a picture."""
        return self.target if isinstance(self.target, ImageTarget) else None

    @property
    def constraint(self) -> Constraint | None:
        """The restriction of a text that is generated after this prompt."""
        return self.target.constraint if isinstance(self.target, TextTarget) else None


def allowed_after(prompt: Sequence, prefix: list[int], end_id: int) -> Items[int] | None:
    """The ids that the prompt's constraint allows after `prefix`; None: any. Where it allows none, the end."""
    if prompt.constraint is None:
        return None
    found = prompt.constraint.next(prefix)
    return found if len(found) or isinstance(found, Banned) else (end_id,)
