"""From the pieces of a source and the tokens of a target to a Sequence.

    source, all see all              target, causal
    text <|image|> patch* <|/image|> <|answer|> t1 t2 ... tn
    labels: none                     t1         t2 t3 ... <|end|>

The end token is only ever predicted, so it has no position of its own.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np

from openm6.errors import DataError
from openm6.sequence import CAUSAL, IGNORE, SOURCE, Picture, Sequence
from openm6.tasks.processor import Processor


class Piece(NamedTuple):
    """A stretch of the source: `ids`, and the `pixels` [H, W, 3] whose patches are the ids between its first and
    its last (or these patches' features). A `cuttable` one may lose its end when the example is too long."""

    ids: Items[int]
    pixels: np.ndarray | None = None
    cuttable: bool = False


def lay_out(
    pieces: list[Piece], target: Items[int] | None, processor: Processor, task: str, reserve: int = 0
) -> Sequence:
    """The Sequence of an example; without a target it ends where the answer begins.

    What is longer than `max_length` is cut: the target keeps up to half of the room that pictures and plain texts
    leave (more where the source needs less; `reserve` stands for a target that is yet to be written), the longest
    source texts lose their ends, and a cut target has no end token. Raises DataError when there is no room.
    """
    tokenizer = processor.tokenizer
    fixed = 1 + sum(len(piece.ids) for piece in pieces if not piece.cuttable)
    loose = sum(len(piece.ids) for piece in pieces if piece.cuttable)
    room = processor.max_length - fixed
    wanted, cut = reserve if target is None else len(target), 0
    if loose + wanted > room:
        if room < (0 if target is None else 1):
            raise DataError(
                f"The example needs {fixed} positions for its pictures and fixed texts alone; "
                f"the model takes {processor.max_length} (max_length)."
            )
        wanted = min(wanted, max(room - loose, (room + 1) // 2))
        pieces = _cut(pieces, room - wanted)
        cut = fixed - 1 + loose - sum(len(piece.ids) for piece in pieces) + len((target or ())[wanted:])
    ids: list[int] = []
    pictures: list[Picture] = []
    for piece in pieces:
        if piece.pixels is not None:
            pictures.append(Picture(piece.pixels, len(ids) + 1, len(piece.ids) - 2))
        ids += piece.ids
    start = len(ids)
    ids.append(tokenizer.answer_id)
    if target is not None:
        ids += target[:wanted]
    blocks = np.full(len(ids), SOURCE, np.int32)
    blocks[start:] = CAUSAL
    labels = np.full(len(ids), IGNORE, np.int32)
    if target is not None:
        labels[start:] = [*target, tokenizer.end_id][: wanted + 1]
    return Sequence(np.array(ids, np.int32), blocks, labels, pictures, task, cut=cut)


def _cut(pieces: list[Piece], budget: int) -> list[Piece]:
    """Shorten the longest cuttable pieces to one length, so that all cuttable ones have `budget` ids together."""
    lengths = sorted(len(piece.ids) for piece in pieces if piece.cuttable)
    longest = 0
    for number, length in enumerate(lengths):
        longest = budget // (len(lengths) - number)
        if length > longest:
            break
        budget -= length
        longest = length
    return [piece._replace(ids=piece.ids[:longest]) if piece.cuttable else piece for piece in pieces]
