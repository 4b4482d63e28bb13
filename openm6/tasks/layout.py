"""Layout of a source's pieces and a target's tokens as a Sequence.

    source                           target, causal
    text <|image|> patch* <|/image|> <|answer|> t1 t2 ... tn
    labels: none                     t1         t2 t3 ... <|end|>

The end token is only predicted, so it has no position of its own. Whether the positions of a source all see each other
or only those before them is a property of the model (`Processor.source`); it is written into `blocks` here and nowhere
else."""

from collections.abc import Sequence as Items

import numpy as np

from openm6.core.errors import ContextLengthError
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE_BLOCKS, Picture, Sequence
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor


def lay_out(
    pieces: list[Piece],
    target: Items[int] | None,
    processor: Processor,
    task: str,
    reserve: int = 0,
    least: int = 0,
    truncate: str | None = "end",
) -> Sequence:
    """The Sequence of an example; without a target it ends where the answer begins. The answer's first token is the
    label of the last position of the pieces (`<|answer|>`, or the end of what a chat template writes before it).

    `truncate`: handling of a source that is longer than `max_length`.

    - "end" (training): the target keeps up to half of the room that pictures and plain texts leave (more where the
      source needs less; `reserve` is the expected length of a target to be generated), the longest source texts lose
      their ends, and a cut target has no end token.
    - "start": the longest source text alone loses its beginning; the target, or `reserve`, keeps up to half of the room
      that all others leave.
    - None: it is refused, and also where it leaves fewer than `least` positions for the answer.

    Raises ContextLengthError when there is no room."""
    tokenizer = processor.tokenizer
    fitted, wanted = _fit(pieces, target, processor.max_length, reserve, least, truncate)
    ids: list[int] = []
    pictures: list[Picture] = []
    for piece in fitted:
        if piece.pixels is not None:
            pictures.append(Picture(piece.pixels, len(ids) + 1, len(piece.ids) - 2))
        ids += piece.ids
    first = next((number for number, piece in enumerate(fitted) if piece.learned), len(fitted))
    start = sum(len(piece.ids) for piece in fitted[:first]) - 1
    truncated = sum(len(piece.ids) for piece in pieces) - len(ids)
    labels = learned_labels(fitted)
    if target is not None:
        ids += target[:wanted]
        truncated += len(target[wanted:])
        labels += [IGNORE] * len(target[:wanted])
        labels[start:] = [*target, tokenizer.end_id][: wanted + 1]
    blocks = np.full(len(ids), SOURCE_BLOCKS[processor.source], np.int32)
    blocks[start:] = CAUSAL
    if fitted[-1].learned:  # its last token is only predicted
        ids, blocks, labels = ids[:-1], blocks[:-1], labels[:-1]
    return Sequence(np.array(ids, np.int32), blocks, np.array(labels, np.int32), pictures, task, truncated=truncated)


def learned_labels(pieces: list[Piece]) -> list[int]:
    """The labels of pieces: each id of a learned one, at the position before it."""
    following = [(i if piece.learned else IGNORE) for piece in pieces for i in piece.ids]
    return [*following[1:], IGNORE]


def _fit(
    pieces: list[Piece], target: Items[int] | None, most: int, reserve: int, least: int, truncate: str | None
) -> tuple[list[Piece], int]:
    """The pieces, shortened to fit `most` positions as `lay_out` says, and the positions of the target that fit."""
    lengths = [len(piece.ids) for piece in pieces if piece.cuttable]
    fixed = sum(len(piece.ids) for piece in pieces if not piece.cuttable)
    loose, room = sum(lengths), most - fixed
    wanted = reserve if target is None else len(target)
    if truncate is None:
        if loose + least > room:
            answer = f" and its answer {least:,}" if least else ""
            raise ContextLengthError(
                f"The prompt has {fixed + loose:,} positions{answer}; the model takes {most:,} (max_length)."
            )
        return pieces, wanted
    if loose + wanted <= room:
        return pieces, wanted
    least = least if target is None else 1
    kept = 0 if truncate == "end" else loose - max(lengths, default=0)  # positions of texts that stay whole
    needed = kept + (truncate == "start" and loose > 0)  # something of the longest text stays
    if room < needed + least:
        what = "all but its longest text" if needed else "its pictures and fixed texts"
        raise ContextLengthError(
            f"The example needs {fixed + kept} positions for {what} alone; the model takes {most} (max_length)."
        )
    wanted = min(wanted, max(least, room - loose, (room - kept + 1 - (needed > 0)) // 2))
    return (_cut_ends if truncate == "end" else _cut_start)(pieces, room - wanted), wanted


def _cut_ends(pieces: list[Piece], budget: int) -> list[Piece]:
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


def _cut_start(pieces: list[Piece], budget: int) -> list[Piece]:
    """Take the beginning from the longest cuttable piece, so that all cuttable ones have `budget` ids together."""
    lengths = [len(piece.ids) if piece.cuttable else 0 for piece in pieces]
    if not any(lengths):
        return pieces
    longest = lengths.index(max(lengths))
    shorter = pieces[longest]._replace(ids=pieces[longest].ids[max(0, sum(lengths) - budget) :])
    return [*pieces[:longest], shorter, *pieces[longest + 1 :]]
