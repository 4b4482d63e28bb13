"""From a record to a Sequence: the left side of an instruction as pieces, the right side as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openm6.errors import DataError, UsageError, cut, suggest
from openm6.sequence import Sequence
from openm6.tasks import corrupt, drawn, sketch, target
from openm6.tasks.forms import characters
from openm6.tasks.grammar import Instruction, Slot
from openm6.tasks.heads import HEADS
from openm6.tasks.layout import Piece, lay_out
from openm6.tasks.processor import Processor
from openm6.tasks.slots import TYPES, image
from openm6.tasks.slots.label import normalize_label
from openm6.tasks.slots.text import as_text

if TYPE_CHECKING:
    from openm6.tasks.task import Task

Record = Mapping[str, Any]

BY_MASKS = 0.4
"""Share of the drawn pictures that are learned by masks; the others one code after the other."""

UNGUIDED = 0.1
"""Share of the drawn pictures without any of the slots that may be dropped, where there are several: guidance leads
away from what is drawn so."""

JUDGED = 0.05
"""Share of the drawn pictures that are whole, and judged: half of them belong to another record."""


class _Given(NamedTuple):
    """A left side: its pieces, what was taken out of its texts, the slots that are there, and which piece is whose."""

    pieces: list[Piece]
    complements: dict[str, str]
    asked: list[str]
    places: dict[str, int]


def encode(
    task: Task,
    record: Record,
    processor: Processor,
    rng: np.random.Generator | None = None,
    with_target: bool = True,
    another: Callable[[], Record] | None = None,
    shots: Items[Record] = (),
) -> Sequence:
    """The Sequence of one record whose keys are the slots' names.

    A task that draws learns verdicts on whole pictures too: those of a record that has them (drawn.ESTIMATES), and
    in training, with `another` record of the same source, whether a picture is the record's own.

    With `rng` (training) it takes any of the instructions and corrupts as they say. Without, the first one, and

    - `with_target=False` (use): the source as it is given, with the gaps written in it; it ends with `<|answer|>`;
    - `with_target=True` (measuring): corrupted too, but alike each time.

    `shots`: other records, which stand before it with their answers, as examples of what is asked for; of too many
    training leaves the first ones out. Raises DataError, which names the slot, for a record that cannot be used, and
    without `rng` says how many of the examples fit.
    """
    number = 0 if rng is None or len(task.instructions) == 1 else int(rng.integers(len(task.instructions)))
    instruction = task.instructions[number]
    given = _given(task, instruction, record, processor, rng, rng is not None or with_target)
    ids = None
    if with_target and not task.silent:
        ids = _written(task, instruction, record, processor, rng, given.complements)
    if task.sketch:
        return _sketched(task, given, ids, processor, rng)
    before = [_shot(task, instruction, shot, processor, rng) for shot in shots]
    reserve = int(task.decode.get("max_new_tokens", 0))
    if task.draws and ids is None:
        reserve = 1 + (0 if processor.codec is None else processor.codec.side**2)
    while True:
        pieces = [_filled_by_adapter(processor), *(piece for shot in before for piece in shot), *given.pieces]
        try:
            sequence = lay_out(pieces, ids, processor, task.name, reserve)
            break
        except DataError:
            if not before:
                raise
            before = before[1:]
    if rng is None and len(before) < len(shots):
        fit = f"the last {len(before)} of them fit" if before else "none of them fits"
        raise DataError(
            f"{where(record)}{len(shots)} examples and the record do not fit the {processor.max_length} positions that "
            f"the model takes (max_length): {fit}."
        )
    if ids is None:
        if task.draws:
            return drawn.begin(sequence, processor.tokenizer)
        if not task.silent:
            sequence.constraint = task.allowed(processor, record) or characters(processor.tokenizer)
        sequence.head = task.head
        if task.head and with_target:
            slot = task.slots[task.outputs[0]]
            try:
                sequence.values = HEADS[task.head].numbers(value_of(task, record, slot, rng))
            except DataError as error:
                raise bad(record, slot, error) from None
        return sequence
    if not task.draws:
        return sequence
    assert processor.codec is not None
    if sequence.labels[-1] != processor.tokenizer.end_id:
        raise DataError(
            f"{where(record)}the {len(ids) - 1} codes of a picture do not fit: the model takes "
            f"{processor.max_length} positions (max_length)."
        )
    codes = np.array(ids[1:], np.int32)
    sequence.codes = range(len(sequence) - len(codes), len(sequence))
    return _learned(task, record, sequence, codes, processor, rng, another, given.asked)


def _sketched(
    task: Task, given: _Given, ids: Items[int] | None, processor: Processor, rng: np.random.Generator | None
) -> Sequence:
    """Of a task that is written from a sketch: the prompt, or one of the things that are learned (for measuring, what
    the gaps of the sketch hold)."""
    number = given.places[task.sketch] + 1
    pieces = [_filled_by_adapter(processor), *given.pieces]
    pieces[number] = pieces[number]._replace(cuttable=False)
    found = lay_out(pieces, None, processor, task.name, int(task.decode.get("max_new_tokens", 0)))
    start = sum(len(piece.ids) for piece in pieces[:number])
    if any(piece.cuttable for piece in pieces[:number]) and not np.array_equal(
        found.ids[start : start + len(pieces[number].ids)], pieces[number].ids
    ):
        raise DataError(f"The example is longer than the {processor.max_length} positions that the model takes.")
    found = replace(found, sketch=range(start, start + len(pieces[number].ids)))
    if ids is None:
        return found
    kind = "fill" if rng is None else None
    text, room = processor.tokenizer.decode(ids), max(1, processor.max_length - len(found) - 1)
    return sketch.learned(found, text, processor.tokenizer, rng or np.random.default_rng(0), room, kind)


def _filled_by_adapter(processor: Processor) -> Piece:
    """The positions before every example that an adapter fills (none, mostly)."""
    return Piece((processor.tokenizer.pad_id,) * processor.prompt)


def _given(
    task: Task,
    instruction: Instruction,
    record: Record,
    processor: Processor,
    rng: np.random.Generator | None,
    spoil: bool,
) -> _Given:
    """The left side of an instruction; `spoil`: with its corruptions."""
    found = _Given([], {}, [], {})
    # A verdict is on a picture as the answer to all that was asked for.
    drops = rng if not (task.draws and drawn.verdicts_of(record)) else None
    unguided = drops is not None and task.controls > 1 and drops.random() < UNGUIDED
    after_text = False  # two texts that touch are kept apart
    for part in instruction.source:
        if isinstance(part, str):
            found.pieces.append(Piece(processor.tokenizer.encode_often(part)))
            after_text = False
            continue
        if part.drop and (
            record.get(part.name) is None or unguided or (drops is not None and drops.random() < part.drop)
        ):
            continue
        value = value_of(task, record, part, rng)
        try:
            if (part.mask or part.prefix) and spoil:
                text = as_text(value)
                own = rng or corrupt.own_generator(text)
                value, found.complements[part.name] = (
                    corrupt.mask(text, part.mask, own) if part.mask else corrupt.prefix(text, own)
                )
            elif part.mask:
                value = corrupt.written_gaps(as_text(value))
            piece = TYPES[part.type].source(value, processor)
        except DataError as error:
            raise bad(record, part, error) from None
        except UsageError as error:
            raise UsageError(f"{part}: {error}") from None
        if after_text and part.type in target.SPOKEN:
            found.pieces.append(Piece((processor.tokenizer.row_id,)))
        found.pieces.append(piece)
        found.asked.append(part.name)
        found.places[part.name] = len(found.pieces) - 1
        after_text = part.type in target.SPOKEN
    return found


def _written(
    task: Task,
    instruction: Instruction,
    record: Record,
    processor: Processor,
    rng: np.random.Generator | None,
    complements: Mapping[str, str],
) -> Items[int]:
    """The right side of an instruction as tokens."""
    written = {}
    for slot in slots_of(instruction.target).values():
        value = complements[slot.name] if slot.name in complements else value_of(task, record, slot, rng)
        try:
            written[slot.name] = TYPES[slot.type].target(value, processor)
        except DataError as error:
            raise bad(record, slot, error) from None
        except UsageError as error:
            raise UsageError(f"{slot}: {error}") from None
    return target.join(instruction.target, written, processor.tokenizer)


def _shot(
    task: Task, instruction: Instruction, record: Record, processor: Processor, rng: np.random.Generator | None
) -> list[Piece]:
    """A record with its answer, to stand before another: all of it is source, and none of it is cut."""
    if task.draws or task.silent:
        raise UsageError(f"The task {task.name} takes no examples: it does not answer in words.")
    given = _given(task, instruction, record, processor, rng, spoil=True)
    answer = _written(task, instruction, record, processor, rng, given.complements)
    tokenizer = processor.tokenizer
    whole = (tokenizer.answer_id, *answer, tokenizer.end_id)
    return [*(piece._replace(cuttable=False) for piece in given.pieces), Piece(whole)]


def _learned(
    task: Task,
    record: Record,
    sequence: Sequence,
    codes: np.ndarray,
    processor: Processor,
    rng: np.random.Generator | None,
    another: Callable[[], Record] | None,
    asked: Items[str],
) -> Sequence:
    """The way in which a picture, the last positions of a sequence, is learned; `asked` are the slots before it."""
    tokenizer, codec = processor.tokenizer, processor.codec
    assert codec is not None
    if verdicts := drawn.verdicts_of(record):
        return drawn.judged(sequence, len(codes), verdicts, tokenizer)
    if rng is None:
        return sequence
    if another is not None and rng.random() < JUDGED:
        verdicts = {"relevance": True, "fidelity": True}
        if rng.random() < 0.5:
            other, slot = another(), task.outputs[0]
            ids = sequence.ids.copy()
            ids[-len(codes) :] = image.target(value_of(task, other, task.slots[slot], rng), processor)[1:]
            sequence = replace(sequence, ids=ids)
            verdicts["relevance"] = all(other.get(name) == record.get(name) for name in asked)
        if not asked:
            del verdicts["relevance"]
        return drawn.judged(sequence, len(codes), verdicts, tokenizer)
    if rng.random() < BY_MASKS:
        return drawn.by_masks(sequence, codes, codec.side, tokenizer, rng)
    return sequence


def value_of(task: Task, record: Record, slot: Slot, rng: np.random.Generator | None) -> Any:
    value = record.get(slot.name)
    if isinstance(value, list) and slot.type in ("text", "label") and value:
        value = value[0 if rng is None else int(rng.integers(len(value)))]
    if value is None:
        keys = [key for key in record if not key.startswith("_")]
        raise DataError(
            f"{where(record)}{slot.name} is missing: the task {task.name} needs it, and the record has "
            f"{', '.join(keys) or 'nothing'}.{suggest(slot.name, keys)}"
        )
    known = task.labels.get(slot.name)
    if known and normalize_label(str(value)) not in known:
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise DataError(
            f"{where(record)}{slot.name}: {cut(value)!r} is none of the task's labels."
            f"{suggest(str(value), known)} They are: {listed}."
        )
    return value


def slots_of(side: Items[Any]) -> dict[str, Slot]:
    return {part.name: part for part in side if isinstance(part, Slot)}


def where(record: Record) -> str:
    return f"{record['_where']}: " if "_where" in record else ""


def bad(record: Record, slot: Slot, error: DataError) -> DataError:
    return DataError(f"{where(record)}{slot.name}: {error}")
