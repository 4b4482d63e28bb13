"""Batch: many sequences laid out in rows for the network, and the mask rule.

Shapes: B rows, T positions a row, N pictures, H x W pixels.

The one mask rule of OpenM6, for a query position q and a key position k of one row:

    allowed(q, k) = segment[q] == segment[k] and (k <= q or block[q] == block[k] >= 0)

`segment` is the number of the example that a position belongs to (0 is padding). Positions of one `block` >= 0 attend
to each other in both directions: 0 is the source, and each picture whose codes are generated has a further number; -1
is causal: the target text, and the source of a model that reads it causally (SOURCE_BLOCKS). The rule gives the
bidirectional, the prefix and the causal Transformer of M6 (KDD 2021, section 4), mixed freely inside one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence as Items
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.core.sequence import CAUSAL, IGNORE, Sequence

MULTIPLE = 8
"""Prompt lengths are padded to a multiple of this: kernels for a new shape are compiled first, which takes as long as
reading a short prompt."""
SHORTEST = 16
"""Smallest padded length: with fewer keys the kernels of a CPU sum in another order."""


@dataclass(slots=True)
class Images:
    """Pictures of one size in a batch: pixels uint8 [N, H, W, 3] or patches' features fp32 [N, rows, columns, D], and
    the places of their patches in the flattened batch, int64 [N * patches] (picture by picture, row by row)."""

    pixels: Tensor
    places: Tensor


@dataclass(slots=True)
class Batch:
    """B rows of T positions. All tensors int64 [B, T] unless said otherwise.

    segments   1-based number of the example inside this batch, 0 on padding
    positions  0, 1, 2, ... inside each example
    images     pictures grouped by size
    tasks, origins   one entry an example (entry i belongs to segment i + 1)
    codes            the columns that hold the codes of every row's picture (`pad_drawn`)
    weights          of each example in the loss, fp32 [examples]; None: all 1
    cells            row and column of each code in its drawn picture, int64 [B, T, 2], -1 elsewhere; None: no picture
    """

    ids: Tensor
    segments: Tensor
    blocks: Tensor
    positions: Tensor
    labels: Tensor
    images: list[Images] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    codes: range | None = None
    weights: Tensor | None = None
    cells: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    def ends(self) -> Tensor:
        """Flat index of the last position of every example, int64 [examples]."""
        segments = self.segments.flatten()
        last = torch.zeros(len(self.tasks) + 1, dtype=torch.int64, device=segments.device)
        return last.scatter_reduce_(0, segments, torch.arange(len(segments), device=segments.device), "amax")[1:]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {n: value.to(device) for n, value in values.items() if isinstance(value, Tensor)}
        images = [Images(i.pixels.to(device), i.places.to(device)) for i in self.images]
        return replace(self, **moved, images=images)


def allowed(segments: Tensor, blocks: Tensor) -> Tensor:
    """The mask rule as a dense boolean tensor: [B, T] and [B, T] to [B, T (query), T (key)]."""
    length = segments.shape[-1]
    past = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    together = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    return (segments[:, :, None] == segments[:, None, :]) & (past | together)


def count_pairs(segments: Tensor, blocks: Tensor) -> int:
    """Number of pairs of query and key that the mask rule allows, padding left out; [B, T] each."""
    lengths = torch.bincount(segments[segments > 0])
    mutual = (segments > 0) & (blocks >= 0)
    groups = torch.bincount(segments[mutual] * (1 + blocks.max()) + blocks[mutual])
    return int((lengths * (lengths + 1)).sum() + (groups * (groups - 1)).sum()) // 2


def pack(sequences: Items[Sequence], row_length: int, pad_id: int, balance_rows: bool = False) -> Batch:
    """Pack examples into as few rows of `row_length` positions as first-fit-decreasing finds.

    With `balance_rows` the examples are spread over that many rows, which become only as long as the fullest: less
    padding (a few percent against an eighth for the demo), for shapes that change from batch to batch. Segment i + 1 is
    `sequences[i]`; examples do not see each other. Raises ValueError if an example is longer than a row."""
    lengths = [len(s) for s in sequences]
    if max(lengths, default=0) > row_length:
        raise ValueError(f"an example of {max(lengths)} positions does not fit a row of {row_length}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in order:
        row = next((r for r, used in enumerate(filled) if used + lengths[index] <= row_length), len(filled))
        if row == len(filled):
            filled.append(0)
        places[index] = (row, filled[row])
        filled[row] += lengths[index]
    if balance_rows and filled:
        spread, other = [0] * len(filled), [(0, 0)] * len(lengths)
        for index in order:
            row = spread.index(min(spread))
            other[index] = (row, spread[row])
            spread[row] += lengths[index]
        if max(spread) < row_length:  # spreading can be worse for few and long examples
            places, row_length = other, max(spread)
    spans = [(row, np.arange(start, start + length)) for (row, start), length in zip(places, lengths, strict=True)]
    return _lay_out(sequences, spans, (max(len(filled), 1), row_length), pad_id)


def by_length(sequences: Items[Sequence], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices of sequences of similar length, to keep padding small."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def padded_length(length: int) -> int:
    """The padded length of a prompt: the next multiple of MULTIPLE, at least SHORTEST."""
    return max(SHORTEST, -(-length // MULTIPLE) * MULTIPLE)


def pad(sequences: Items[Sequence], pad_id: int, rounded: bool = False) -> Batch:
    """One example a row, padded on the right to the longest (`rounded`: to its `padded_length`), as for decoding."""
    width = max((len(s) for s in sequences), default=1)
    shape = len(sequences), padded_length(width) if rounded else width
    return _lay_out(sequences, [(row, np.arange(len(s))) for row, s in enumerate(sequences)], shape, pad_id)


def pad_drawn(sequences: Items[Sequence], pad_id: int) -> Batch:
    """One example a row, each with a picture of equally many codes, which are aligned to the same columns: padding is
    between a shorter text and its codes, and at the end."""
    spans = [s.image.codes for s in sequences if s.image]
    tails = [len(s) - span.stop for s, span in zip(sequences, spans, strict=True)]
    start, count = max(span.start for span in spans), len(spans[0])
    columns = np.arange(start + count + max(tails))
    places = [
        columns[(columns < span.start) | ((columns >= start) & (columns < start + count + tail))]
        for span, tail in zip(spans, tails, strict=True)
    ]
    batch = _lay_out(sequences, list(enumerate(places)), (len(sequences), len(columns)), pad_id)
    batch.codes = range(start, start + count)
    return batch


def _lay_out(
    sequences: Items[Sequence], places: list[tuple[int, np.ndarray]], shape: tuple[int, int], pad_id: int
) -> Batch:
    """Lay out sequences at `places`: the row of each, and the columns of its positions."""
    ids = np.full(shape, pad_id, np.int64)
    segments, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    blocks, labels = np.full(shape, CAUSAL, np.int64), np.full(shape, IGNORE, np.int64)
    cells = torch.full((*shape, 2), -1) if any(sequence.image for sequence in sequences) else None
    for number, (sequence, (row, columns)) in enumerate(zip(sequences, places, strict=True), 1):
        ids[row, columns] = sequence.ids
        segments[row, columns] = number
        blocks[row, columns] = sequence.blocks
        positions[row, columns] = np.arange(len(sequence))
        labels[row, columns] = sequence.labels
        if cells is not None and sequence.image:
            codes = sequence.image.codes
            cells[row, columns[codes.start : codes.stop]] = cells_of(len(codes))
    weights = [s.image.weight if s.image else 1.0 for s in sequences]
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(segments),
        torch.from_numpy(blocks),
        torch.from_numpy(positions),
        torch.from_numpy(labels),
        images=list(_group_images(sequences, places, shape[1])),
        tasks=[s.task for s in sequences],
        origins=[s.origin for s in sequences],
        weights=None if all(weight == 1 for weight in weights) else torch.tensor(weights),
        cells=cells,
    )


@cache
def cells_of(count: int) -> Tensor:
    """Row and column of the codes of a square picture, int64 [count, 2]; cached, read-only."""
    numbers, side = torch.arange(count), math.isqrt(count)
    return torch.stack((numbers // side, numbers % side), 1)


def _group_images(
    sequences: Items[Sequence], places: list[tuple[int, np.ndarray]], row_length: int
) -> Iterable[Images]:
    """Pictures grouped by size, each with the flat indices of its patches."""
    groups: dict[tuple[Any, ...], tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for sequence, (row, columns) in zip(sequences, places, strict=True):
        for picture in sequence.pictures:
            pixels, where = groups.setdefault((picture.pixels.dtype, picture.pixels.shape), ([], []))
            pixels.append(picture.pixels)
            where.append(row * row_length + columns[picture.start : picture.start + picture.patches])
    for pixels, where in groups.values():
        yield Images(torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.concatenate(where)))
