"""The left side of an instruction as pieces, or as the turns of its slot of messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from openm6.tasks import corrupt, drawn, target
from openm6.tasks.grammar import Instruction, Slot
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.record import Record, is_given, labels_of, slot_errors, value_of
from openm6.tasks.slots import TYPES, messages
from openm6.tasks.slots.text import as_text, spoken
from openm6.tasks.task import Task
from openm6.tasks.turns import Turn

UNGUIDED_FRACTION = 0.1
"""Fraction of the pictures without any of the slots that may be dropped, where there are several: guidance leads away
from pictures drawn without them."""

LISTED, LISTED_FRACTION = 32, 0.25
"""Maximum number of labels that a prompt lists (`[choices|of=label]`), and fraction of the model's positions that they
may take. More are not listed: the answer is restricted to them all the same."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The setting in which the records of one example are encoded.

    rng              of training: draws texts, corruptions and dropped slots; None: the same each time
    max_positions    of a request: positions of the model, by which the size of a value is checked
    system           system text of a request; None: the task's, else that of the model's chat form
    thinking         whether the model is to reason first, where its chat template has a switch; None: its own default
    """

    task: Task
    instruction: Instruction
    processor: Processor
    rng: np.random.Generator | None = None
    max_positions: int | None = None
    system: str | None = None
    thinking: bool | None = None


class Source(NamedTuple):
    """An encoded left side: its pieces, the texts that were taken out of it by slot, the index of each slot's piece;
    or the turns of its slot of messages."""

    pieces: list[Piece]
    complements: dict[str, str]
    places: dict[str, int]
    turns: list[Turn]


def encode_source(encoding: Encoding, record: Record, corrupted: bool = False) -> Source:
    """Encode the left side of the instruction; `corrupted`: with the corruptions of its slots."""
    task, processor = encoding.task, encoding.processor
    source = Source([], {}, {}, [])
    # A verdict refers to all inputs.
    rng = None if task.draws and drawn.verdicts_of(record) else encoding.rng
    unguided = rng is not None and task.controls > 1 and rng.random() < UNGUIDED_FRACTION
    after_text = False  # two texts that touch are kept apart
    lines = _lines(encoding.instruction) if processor.chat else frozenset()
    for number, part in enumerate(encoding.instruction.source):
        line = [spoken("\n", processor)] if number in lines and source.pieces else []
        if isinstance(part, str):
            source.pieces.extend(line)
            text = part if source.pieces else part.lstrip()
            _add_text(source, processor, _between(text, number, lines))
            after_text = False
            continue
        listed = _listed(encoding, record, part) if part.type == "choices" else ()
        is_absent = not listed if part.type == "choices" else not is_given(record, part)
        if part.is_optional and (is_absent or unguided or (rng is not None and part.drop and rng.random() < part.drop)):
            continue
        source.pieces.extend(line)
        value = listed or value_of(task, record, part, encoding.rng, encoding.max_positions)
        if part.before:
            _add_text(source, processor, part.before if source.pieces else part.before.lstrip())
            after_text = False
        with slot_errors(record, part):
            if (part.mask or part.prefix) and corrupted:
                text = as_text(value)
                own = encoding.rng or corrupt.own_generator(text)
                value, source.complements[part.name] = (
                    corrupt.mask(text, part.mask, own) if part.mask else corrupt.prefix(text, own)
                )
            elif part.mask:
                value = corrupt.written_gaps(as_text(value))
            if part.type == "messages":
                source.turns.extend(messages.turns(value, processor))
                continue
            piece = TYPES[part.type].source(value, processor)
        if after_text and not processor.chat and part.type in target.SPOKEN:
            source.pieces.append(Piece((processor.tokenizer.row_id,)))
        source.places[part.name] = len(source.pieces)
        source.pieces.append(piece)
        after_text = part.type in target.SPOKEN
        if part.after:
            _add_text(source, processor, part.after)
            after_text = False
    return source


_ON_LINES = ("text", "table", "triples")
"""Slot types that stand on lines of their own where a chat template asks."""


def _lines(instruction: Instruction) -> frozenset[int]:
    """The numbers of the parts that begin a line where a chat template asks: where the line of the instruction has a
    blank beside a text, a table or triples that are not in a group, as in a letter; elsewhere it runs on."""
    parts = instruction.source

    def stands_alone(part: str | Slot) -> bool:
        return isinstance(part, Slot) and part.type in _ON_LINES and not part.is_grouped

    return frozenset(
        number for number in instruction.apart if stands_alone(parts[number]) or stands_alone(parts[number - 1])
    )


def _between(text: str, number: int, lines: frozenset[int]) -> str:
    """A plain text without the blanks that its line breaks take the place of."""
    text = text.lstrip() if number in lines else text
    return text.rstrip() if number + 1 in lines else text


def _add_text(source: Source, processor: Processor, text: str) -> None:
    source.pieces.append(spoken(text, processor) if processor.chat else Piece(processor.tokenizer.encode_often(text)))


def _listed(encoding: Encoding, record: Record, slot: Slot) -> tuple[str, ...]:
    """The labels that the prompt lists: those of the record or the task, if they are few and short enough."""
    labels = labels_of(encoding.task, record, slot.of, encoding.max_positions)
    if len(labels) > LISTED:
        return ()
    room = encoding.processor.max_length * LISTED_FRACTION
    return labels if len(TYPES["choices"].target(labels, encoding.processor)) <= room else ()


def size_of(piece: Piece, processor: Processor) -> int:
    return len(piece.ids) if piece.text is None else len(processor.tokenizer.encode(piece.text))
