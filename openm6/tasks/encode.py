"""From a record to a Sequence: the left side of an instruction as pieces, the right side as tokens.

encode_prompt    in use: the source, up to `<|answer|>`
encode_example   in training and measuring: the source, corrupted, and what is learned of its answer"""

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.core.sequence import HeadTarget, ImageTarget, Sequence, SketchTarget, TextTarget
from openm6.tasks import corrupt, drawn, sketch, target
from openm6.tasks.forms import answer_constraint, characters
from openm6.tasks.grammar import Instruction, Slot, slots_of
from openm6.tasks.heads import HEADS
from openm6.tasks.layout import Piece, lay_out
from openm6.tasks.lengths import CHARACTERS
from openm6.tasks.processor import Processor
from openm6.tasks.record import Record, is_given, labels_of, slot_errors, value_of, where
from openm6.tasks.slots import TYPES, image
from openm6.tasks.slots.text import as_text
from openm6.tasks.task import Task

MASKED_FRACTION = 0.4
"""Fraction of the pictures whose codes are learned by masks; the others are learned in order."""

UNGUIDED_FRACTION = 0.1
"""Fraction of the pictures without any of the slots that may be dropped, where there are several: guidance leads away
from pictures drawn without them."""

LISTED, LISTED_FRACTION = 32, 0.25
"""Maximum number of labels that a prompt lists (`[choices|of=label]`), and fraction of the model's positions that they
may take. More are not listed: the answer is restricted to them all the same."""

VERDICT_FRACTION = 0.05
"""Fraction of the pictures that are whole and get verdicts: half of them are another record's."""


@dataclass(frozen=True, slots=True)
class _Encoding:
    """The setting in which the records of one example are encoded.

    rng              of training: draws texts, corruptions and dropped slots; None: the same each time
    max_positions    of a request: positions of the model, by which the size of a value is checked"""

    task: Task
    instruction: Instruction
    processor: Processor
    rng: np.random.Generator | None = None
    max_positions: int | None = None


class _Source(NamedTuple):
    """An encoded left side: its pieces, the texts that were taken out of it by slot, the index of each slot's piece."""

    pieces: list[Piece]
    complements: dict[str, str]
    places: dict[str, int]


def encode_prompt(
    task: Task, record: Record, processor: Processor, shots: Items[Record] = (), truncate: str | None = None
) -> Sequence:
    """The Sequence from which a record is answered: its source by the first instruction, with the gaps written in it.

    `shots` are other records, with their answers, to stand before it. `truncate` says how a source that is longer than
    the model's maximum is handled. None: it is refused. "start": the longest text loses its beginning, unless there are
    `shots`. "end": texts lose their ends (see lay_out). `Sequence.truncated` counts the positions that were left out.

    Raises DataError, which names the slot, for a record that cannot be used; ContextLengthError, with its positions and
    the model's, for a prompt that is too long, with the number of shots that fit."""
    record, truncate, lost = _before_truncation(task, record, processor, shots, truncate)
    encoding = _Encoding(task, task.instructions[0], processor, None, processor.max_length)
    source = _encode_source(encoding, record)
    if task.sketch:
        return _sketch_prompt(encoding, record, source, truncate, lost)
    prompt = _lay_out(encoding, record, source, None, shots, truncate)
    prompt.truncated += lost
    if task.draws:
        return drawn.open_picture(prompt, processor.tokenizer)
    if not task.produces_no_tokens:
        constraint = answer_constraint(task, record, processor.tokenizer) or characters(processor.tokenizer)
        prompt.target = TextTarget(constraint)
    return prompt


def encode_example(
    task: Task,
    record: Record,
    processor: Processor,
    rng: np.random.Generator | None = None,
    another: Callable[[], Record] | None = None,
    shots: Items[Record] = (),
    truncate: str = "end",
) -> Sequence:
    """The Sequence by which a record is learned (with `rng`: any instruction, random corruptions) or measured (without:
    the first instruction, the same corruptions each time).

    A task that draws also learns verdicts on whole pictures: those of a record that has them (drawn.ESTIMATES), and in
    training, with `another` record of the same source, whether a picture is the record's own.

    `shots`, `truncate` and errors as in `encode_prompt`; training leaves out the first of too many shots."""
    record, permitted, lost = _before_truncation(task, record, processor, shots, truncate)
    number = 0 if rng is None or len(task.instructions) == 1 else int(rng.integers(len(task.instructions)))
    encoding = _Encoding(task, task.instructions[number], processor, rng)
    source = _encode_source(encoding, record, corrupted=True)
    ids = None if task.produces_no_tokens else _encode_target(encoding, record, source.complements)
    if ids is not None and task.sketch:
        prompt = _sketch_prompt(encoding, record, source, permitted, lost)
        room, chance = max(1, processor.max_length - len(prompt) - 1), rng or np.random.default_rng(0)
        text = processor.tokenizer.decode(ids)
        return sketch.example(prompt, text, processor.tokenizer, chance, room, "fill" if rng is None else None)
    example = _lay_out(encoding, record, source, ids, shots, permitted)
    example.truncated += lost
    if task.head:
        slot = task.slots[task.outputs[0]]
        value = value_of(task, record, slot, rng)
        with slot_errors(record, slot):
            example.target = HeadTarget(task.head, HEADS[task.head].numbers(value))
    if ids is not None and task.draws:
        return _image_objective(encoding, record, example, np.array(ids[1:], np.int32), another, list(source.places))
    return example


def _before_truncation(
    task: Task, record: Record, processor: Processor, shots: Items[Record], truncate: str | None
) -> tuple[Record, str | None, int]:
    """The record, the permitted `truncate`, and the minimum number of positions left out already: "start" first
    shortens texts that are too long to be tokenized at all (lengths.check_value)."""
    if truncate != "start" or shots:
        return record, None if truncate == "start" else truncate, 0
    most = CHARACTERS * processor.max_length
    long = {
        name: value
        for name in task.inputs
        if task.slots[name].type == "text" and isinstance(value := record.get(name), str) and len(value) > most
    }
    lost = sum(-(-(len(value) - most) // CHARACTERS) for value in long.values())
    return {**record, **{name: value[-most:] for name, value in long.items()}}, truncate, lost


def _encode_source(encoding: _Encoding, record: Record, corrupted: bool = False) -> _Source:
    """Encode the left side of the instruction; `corrupted`: with the corruptions of its slots."""
    task, processor = encoding.task, encoding.processor
    source = _Source([], {}, {})
    # A verdict refers to all inputs.
    rng = None if task.draws and drawn.verdicts_of(record) else encoding.rng
    unguided = rng is not None and task.controls > 1 and rng.random() < UNGUIDED_FRACTION
    after_text = False  # two texts that touch are kept apart
    for part in encoding.instruction.source:
        if isinstance(part, str):
            source.pieces.append(Piece(processor.tokenizer.encode_often(part if source.pieces else part.lstrip())))
            after_text = False
            continue
        listed = _listed(encoding, record, part) if part.type == "choices" else ()
        is_absent = not listed if part.type == "choices" else not is_given(record, part)
        if part.is_optional and (is_absent or unguided or (rng is not None and part.drop and rng.random() < part.drop)):
            continue
        value = listed or value_of(task, record, part, encoding.rng, encoding.max_positions)
        if part.before:
            before = part.before if source.pieces else part.before.lstrip()
            source.pieces.append(Piece(processor.tokenizer.encode_often(before)))
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
            piece = TYPES[part.type].source(value, processor)
        if after_text and part.type in target.SPOKEN:
            source.pieces.append(Piece((processor.tokenizer.row_id,)))
        source.places[part.name] = len(source.pieces)
        source.pieces.append(piece)
        after_text = part.type in target.SPOKEN
        if part.after:
            source.pieces.append(Piece(processor.tokenizer.encode_often(part.after)))
            after_text = False
    return source


def _listed(encoding: _Encoding, record: Record, slot: Slot) -> tuple[str, ...]:
    """The labels that the prompt lists: those of the record or the task, if they are few and short enough."""
    labels = labels_of(encoding.task, record, slot.of, encoding.max_positions)
    if len(labels) > LISTED:
        return ()
    room = encoding.processor.max_length * LISTED_FRACTION
    return labels if len(TYPES["choices"].source(labels, encoding.processor).ids) <= room else ()


def _encode_target(encoding: _Encoding, record: Record, complements: Mapping[str, str]) -> Items[int]:
    """Encode the right side of the instruction; `complements` are the texts taken out of the source."""
    written = {}
    for slot in slots_of(encoding.instruction.target).values():
        value = complements.get(slot.name)
        if value is None:
            value = value_of(encoding.task, record, slot, encoding.rng, encoding.max_positions)
        with slot_errors(record, slot):
            written[slot.name] = TYPES[slot.type].target(value, encoding.processor)
    return target.join(encoding.instruction.target, written, encoding.processor.tokenizer)


def _encode_shot(encoding: _Encoding, record: Record) -> list[Piece]:
    """Encode a record with its answer, to stand before another: all of it is source and is never cut."""
    task, tokenizer = encoding.task, encoding.processor.tokenizer
    if task.draws or task.produces_no_tokens:
        raise UsageError(f"The task {task.name} takes no examples: it does not answer in words.")
    source = _encode_source(encoding, record, corrupted=True)
    answer = _encode_target(encoding, record, source.complements)
    whole = (tokenizer.answer_id, *answer, tokenizer.end_id)
    return [*(piece._replace(cuttable=False) for piece in source.pieces), Piece(whole)]


def _lay_out(
    encoding: _Encoding,
    record: Record,
    source: _Source,
    ids: Items[int] | None,
    shots: Items[Record],
    truncate: str | None,
) -> Sequence:
    """Lay out the example after its shots; in training after the last of them that fit."""
    task, processor = encoding.task, encoding.processor
    prefix = Piece((processor.tokenizer.pad_id,) * processor.prompt)
    every = [_encode_shot(encoding, shot) for shot in shots]
    reserve, least = int(task.decode.get("max_new_tokens", 0)), 0
    if task.draws and ids is None:
        reserve = 1 + (0 if processor.codec is None else processor.codec.side**2)
        least = 0 if truncate == "end" else reserve
    for dropped in range(len(every) + 1):
        pieces = [prefix, *(piece for shot in every[dropped:] for piece in shot), *source.pieces]
        try:
            found = lay_out(pieces, ids, processor, task.name, reserve, least, truncate)
            break
        except ContextLengthError as error:
            if dropped == len(every):
                raise _too_long(encoding, record, source, error, truncate is None and not shots) from None
    if dropped and encoding.rng is None:
        left = len(every) - dropped
        fit = f"the last {left} of them fit" if left else "none of them fits"
        needed = len(found) + sum(len(piece.ids) for shot in every[:dropped] for piece in shot)
        raise ContextLengthError(
            f"{where(record)}{len(shots)} examples and the record do not fit: they have {needed:,} positions, and the "
            f"model takes {processor.max_length:,} (max_length); {fit}.",
            param="examples",
        )
    return found


def _sketch_prompt(encoding: _Encoding, record: Record, source: _Source, truncate: str | None, lost: int) -> Sequence:
    """The prompt of a task with a sketch. The slot of the sketch is never shortened."""
    task, processor = encoding.task, encoding.processor
    number = source.places[task.sketch] + 1
    pieces = [Piece((processor.tokenizer.pad_id,) * processor.prompt), *source.pieces]
    pieces[number] = pieces[number]._replace(cuttable=False)
    start = sum(len(piece.ids) for piece in pieces[:number])
    place = range(start, start + len(pieces[number].ids))
    reserve = int(task.decode.get("max_new_tokens", 0))
    try:
        prompt = lay_out(pieces, None, processor, task.name, reserve, truncate=truncate)
        if lost or not np.array_equal(prompt.ids[place.start : place.stop], pieces[number].ids):
            raise ContextLengthError(
                f"The example is longer than the {processor.max_length} positions that the model takes."
            )
    except ContextLengthError as error:
        raise _too_long(encoding, record, source, error, truncate is None) from None
    prompt.target = SketchTarget(place)
    return prompt


def _image_objective(
    encoding: _Encoding,
    record: Record,
    example: Sequence,
    codes: np.ndarray,
    another: Callable[[], Record] | None,
    given: Items[str],
) -> Sequence:
    """Choose how the `codes` of a picture, the last positions of the example, are learned: with verdicts, by masks, or
    in order. `given` are the slots of its source."""
    processor, rng = encoding.processor, encoding.rng
    tokenizer, codec = processor.tokenizer, processor.codec
    assert codec is not None
    if example.labels[-1] != tokenizer.end_id:
        raise DataError(
            f"{where(record)}the {len(codes)} codes of a picture do not fit: the model takes "
            f"{processor.max_length} positions (max_length)."
        )
    example.target = ImageTarget(range(len(example) - len(codes), len(example)))
    if verdicts := drawn.verdicts_of(record):
        return drawn.append_verdicts(example, verdicts, tokenizer)
    if rng is None:
        return example
    if another is not None and rng.random() < VERDICT_FRACTION:
        verdicts = {"relevance": True, "fidelity": True}
        if rng.random() < 0.5:
            other, slot = another(), encoding.task.slots[encoding.task.outputs[0]]
            verdicts["relevance"] = all(other.get(name) == record.get(name) for name in given)
            example.ids[-len(codes) :] = image.target(value_of(encoding.task, other, slot, rng), processor)[1:]
        if not given:
            del verdicts["relevance"]
        return drawn.append_verdicts(example, verdicts, tokenizer)
    if rng.random() < MASKED_FRACTION:
        return drawn.mask_codes(example, codes, codec.side, tokenizer, rng)
    return example


def _too_long(
    encoding: _Encoding, record: Record, source: _Source, error: Exception, is_truncatable: bool
) -> ContextLengthError:
    """The error with the record's place and, for a request that may be truncated, its longest text."""
    sizes = {name: len(source.pieces[n].ids) for name, n in source.places.items() if source.pieces[n].cuttable}
    sizes.pop(encoding.task.sketch, None)
    longest, advice = max(sizes, key=lambda name: sizes[name], default=None), ""
    others = sum(len(piece.ids) for piece in source.pieces) - sizes.get(longest or "", 0)
    is_request = encoding.max_positions is not None
    if longest and is_request and is_truncatable and others < encoding.processor.max_length - 1:
        advice = (
            f' Shorten {longest}, its longest text ({sizes[longest]:,} positions), or let truncate="start" leave out '
            "its beginning."
        )
    return ContextLengthError(f"{where(record)}{error}{advice}", param=longest)
