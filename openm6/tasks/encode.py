"""From a record to a Sequence: the left side of an instruction as pieces, the right side as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openm6.core.errors import ContextLengthError, DataError, UsageError, cut, suggest
from openm6.core.sequence import Sequence
from openm6.tasks import corrupt, drawn, sketch, target
from openm6.tasks.forms import characters
from openm6.tasks.grammar import Instruction, Slot
from openm6.tasks.heads import HEADS
from openm6.tasks.layout import Piece, lay_out
from openm6.tasks.lengths import CHARACTERS, check_value
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
    truncate: str | None = None,
) -> Sequence:
    """The Sequence of one record whose keys are the slots' names.

    A task that draws learns verdicts on whole pictures too: those of a record that has them (drawn.ESTIMATES), and
    in training, with `another` record of the same source, whether a picture is the record's own.

    With `rng` (training) it takes any of the instructions and corrupts as they say. Without, the first one, and

    - `with_target=False` (use): the source as it is given, with the gaps written in it; it ends with `<|answer|>`;
    - `with_target=True` (measuring): corrupted too, but alike each time.

    `shots`: other records, which stand before it with their answers, as examples of what is asked for; of too many
    training leaves the first ones out.

    A source that is longer than the model takes is refused in use, and loses the ends of its texts where there is a
    target. `truncate`: "start" takes the beginning from its longest text instead, but from nothing that stands behind
    examples; "end" is what a target's source loses (see lay_out). What was left out is counted in `cut`.

    Raises DataError, which names the slot, for a record that cannot be used; ContextLengthError with its positions and
    the model's for one that is too long, and without `rng` says how many of the examples fit.
    """
    number = 0 if rng is None or len(task.instructions) == 1 else int(rng.integers(len(task.instructions)))
    instruction, in_use = task.instructions[number], rng is None and not with_target
    if truncate is None and not in_use:
        truncate = "end"
    elif truncate == "start" and shots:
        truncate = None
    bound, lost = (processor.max_length, 0) if in_use else (None, 0)
    if truncate == "start":
        record, lost = _shortened(task, record, processor.max_length)
    given = _given(task, instruction, record, processor, rng, not in_use, bound)
    ids = None
    if with_target and not task.silent:
        ids = _written(task, instruction, record, processor, rng, given.complements)
    if task.sketch:
        return _sketched(task, record, given, ids, processor, rng, truncate, lost)
    before = every = [_shot(task, instruction, shot, processor, rng, bound) for shot in shots]
    reserve, least = int(task.decode.get("max_new_tokens", 0)), 0
    if task.draws and ids is None:
        reserve = 1 + (0 if processor.codec is None else processor.codec.side**2)
        least = 0 if truncate == "end" else reserve
    while True:
        pieces = [_filled_by_adapter(processor), *(piece for shot in before for piece in shot), *given.pieces]
        try:
            sequence = lay_out(pieces, ids, processor, task.name, reserve, least, truncate)
            break
        except ContextLengthError as error:
            if not before:
                may = in_use and truncate is None and not shots
                raise _too_long(given, record, task, processor.max_length, error, may) from None
            before = before[1:]
    sequence.cut += lost
    if rng is None and len(before) < len(shots):
        fit = f"the last {len(before)} of them fit" if before else "none of them fits"
        needed = len(sequence) + sum(len(piece.ids) for shot in every[: len(shots) - len(before)] for piece in shot)
        raise ContextLengthError(
            f"{where(record)}{len(shots)} examples and the record do not fit: they have {needed:,} positions, and the "
            f"model takes {processor.max_length:,} (max_length); {fit}.",
            param="examples",
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
    task: Task,
    record: Record,
    given: _Given,
    ids: Items[int] | None,
    processor: Processor,
    rng: np.random.Generator | None,
    truncate: str | None,
    lost: int,
) -> Sequence:
    """Of a task that is written from a sketch: the prompt, or one of the things that are learned (for measuring, what
    the gaps of the sketch hold). The slot that is sketched from is never shortened."""
    number = given.places[task.sketch] + 1
    pieces = [_filled_by_adapter(processor), *given.pieces]
    pieces[number] = pieces[number]._replace(cuttable=False)
    reserve = int(task.decode.get("max_new_tokens", 0))
    start = sum(len(piece.ids) for piece in pieces[:number])
    place = range(start, start + len(pieces[number].ids))
    try:
        found = lay_out(pieces, None, processor, task.name, reserve, truncate=truncate)
        if lost or not np.array_equal(found.ids[place.start : place.stop], pieces[number].ids):
            raise ContextLengthError(
                f"The example is longer than the {processor.max_length} positions that the model takes."
            )
    except ContextLengthError as error:
        raise _too_long(given, record, task, processor.max_length, error, ids is None and truncate is None) from None
    found = replace(found, sketch=place)
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
    bound: int | None,
) -> _Given:
    """The left side of an instruction; `spoil`: with its corruptions; `bound`: see value_of."""
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
        value = value_of(task, record, part, rng, bound)
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
    bound: int | None = None,
) -> Items[int]:
    """The right side of an instruction as tokens; `bound`: see value_of."""
    written = {}
    for slot in slots_of(instruction.target).values():
        value = complements[slot.name] if slot.name in complements else value_of(task, record, slot, rng, bound)
        try:
            written[slot.name] = TYPES[slot.type].target(value, processor)
        except DataError as error:
            raise bad(record, slot, error) from None
        except UsageError as error:
            raise UsageError(f"{slot}: {error}") from None
    return target.join(instruction.target, written, processor.tokenizer)


def _shot(
    task: Task,
    instruction: Instruction,
    record: Record,
    processor: Processor,
    rng: np.random.Generator | None,
    bound: int | None,
) -> list[Piece]:
    """A record with its answer, to stand before another: all of it is source, and none of it is cut."""
    if task.draws or task.silent:
        raise UsageError(f"The task {task.name} takes no examples: it does not answer in words.")
    given = _given(task, instruction, record, processor, rng, spoil=True, bound=bound)
    answer = _written(task, instruction, record, processor, rng, given.complements, bound)
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


def _shortened(task: Task, record: Record, positions: int) -> tuple[Record, int]:
    """The record without the beginnings of texts that are too long to be cut into tokens at all (lengths.check_value),
    and how many positions these have at least."""
    most = CHARACTERS * positions
    long = {
        name: value
        for name in task.inputs
        if task.slots[name].type == "text" and isinstance(value := record.get(name), str) and len(value) > most
    }
    lost = sum(-(-(len(value) - most) // CHARACTERS) for value in long.values())
    return {**record, **{name: value[-most:] for name, value in long.items()}}, lost


def _too_long(given: _Given, record: Record, task: Task, most: int, error: Exception, may: bool) -> ContextLengthError:
    """The error with the record's place and, where it helps and it `may` be truncated, the text to be shortened."""
    sizes = {name: len(given.pieces[place].ids) for name, place in given.places.items() if given.pieces[place].cuttable}
    sizes.pop(task.sketch, None)
    longest, advice = max(sizes, key=lambda name: sizes[name], default=None), ""
    if longest and may and sum(len(piece.ids) for piece in given.pieces) - sizes[longest] < most - 1:
        advice = (
            f' Shorten {longest}, its longest text ({sizes[longest]:,} positions), or let truncate="start" leave out '
            "its beginning."
        )
    return ContextLengthError(f"{where(record)}{error}{advice}", param=longest)


def value_of(task: Task, record: Record, slot: Slot, rng: np.random.Generator | None, bound: int | None = None) -> Any:
    """The value of a slot, of several texts one. `bound`: of a request, the positions of the model, by which the
    value's size is checked before anything else is done with it. Raises DataError, which names the slot."""
    value = record.get(slot.name)
    if isinstance(value, list) and slot.type in ("text", "label") and value:
        value = value[0 if rng is None else int(rng.integers(len(value)))]
    if value is None:
        keys = [key for key in record if not key.startswith("_")][:20]
        raise DataError(
            f"{where(record)}{slot.name} is missing: the task {task.name} needs it, and the record has "
            f"{', '.join(map(cut, keys)) or 'nothing'}.{suggest(slot.name, keys)}",
            param=slot.name,
        )
    if bound is not None and slot.type != "image":
        try:
            check_value(value, bound)
        except DataError as error:
            raise bad(record, slot, error) from None
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
    return type(error)(f"{where(record)}{slot.name}: {error}", param=slot.name)
