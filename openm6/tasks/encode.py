"""From a record to a Sequence: the left side of an instruction as pieces, the right side as tokens.

encode_prompt    in use: the source, up to `<|answer|>`
encode_example   in training and measuring: the source, corrupted, and what is learned of its answer"""

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import replace

import numpy as np

from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.core.sequence import HeadTarget, ImageTarget, Sequence, SketchTarget, TextTarget
from openm6.tasks import drawn, sketch, target
from openm6.tasks.encode_source import Encoding, Source, encode_source, size_of
from openm6.tasks.forms import AfterReasoning, answer_constraint, characters
from openm6.tasks.grammar import slots_of
from openm6.tasks.heads import HEADS
from openm6.tasks.layout import lay_out
from openm6.tasks.lengths import CHARACTERS
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.record import Record, record_errors, slot_errors, value_of, where
from openm6.tasks.slots import TYPES, image, messages
from openm6.tasks.slots.text import spoken
from openm6.tasks.task import Task
from openm6.tasks.turns import Turn, keeps_turns, lay_out_turns

MASKED_FRACTION = 0.4
"""Fraction of the pictures whose codes are learned by masks; the others are learned in order."""

ANSWER = "_answer"
"""Key of a record with the message that answers its conversation, where it is more than a text."""

TURNS = "_turns"
"""Key of a record of a conversation: "last" where its last answer alone is learned."""

VERDICT_FRACTION = 0.05
"""Fraction of the pictures that are whole and get verdicts: half of them are another record's."""


def asked_of(task: Task, processor: Processor) -> Task:
    """The task as a model is asked: one with a chat template writes from a sketch as it writes all else, in order."""
    return replace(task, sketch="") if task.sketch and processor.chat is not None else task


def encode_prompt(
    task: Task, record: Record, processor: Processor, shots: Items[Record] = (), truncate: str | None = None,
    system: str | None = None, thinking: bool | None = None,
) -> Sequence:  # fmt: skip
    """The Sequence from which a record is answered: its source by the first instruction, with the gaps written in it.

    `shots` are other records, with their answers, to stand before it. `system` is a text before all (None: the task's,
    else that of the model's chat form), `thinking` lets a model reason first whose chat template has a switch for it.
    `truncate` says how a source that is longer than
    the model's maximum is handled. None: it is refused. "start": the longest text loses its beginning, unless there are
    `shots`. "end": texts lose their ends (see lay_out). `Sequence.truncated` counts the positions that were left out.

    Raises DataError, which names the slot, for a record that cannot be used; ContextLengthError, with its positions and
    the model's, for a prompt that is too long, with the number of shots that fit."""
    record, truncate, lost = _before_truncation(task, record, processor, shots, truncate)
    encoding = Encoding(task, task.instructions[0], processor, None, processor.max_length, system, thinking)
    source = encode_source(encoding, record)
    if task.sketch:
        return _sketch_prompt(encoding, record, source, truncate, lost)
    prompt = _lay_out(encoding, record, source, None, shots, truncate)
    prompt.truncated += lost
    if task.draws:
        return drawn.open_picture(prompt, processor.tokenizer)
    if not task.produces_no_tokens:
        constraint = answer_constraint(task, record, processor.tokenizer)
        if constraint is not None and processor.chat and processor.chat.is_thinking(thinking):
            constraint = AfterReasoning(constraint, processor.chat, processor.tokenizer)
        prompt.target = TextTarget(constraint or characters(processor.tokenizer))
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
    encoding = Encoding(task, task.instructions[number], processor, rng)
    source = encode_source(encoding, record, corrupted=True)
    if source.turns:
        return _conversation(encoding, record, source, permitted)
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


def _encode_target(encoding: Encoding, record: Record, complements: Mapping[str, str]) -> Items[int]:
    """Encode the right side of the instruction; `complements` are the texts taken out of the source."""
    written = {}
    for slot in slots_of(encoding.instruction.target).values():
        value = complements.get(slot.name)
        if value is None:
            value = value_of(encoding.task, record, slot, encoding.rng, encoding.max_positions)
        with slot_errors(record, slot):
            written[slot.name] = TYPES[slot.type].target(value, encoding.processor)
    return target.join(encoding.instruction.target, written, encoding.processor.tokenizer)


def _encode_shot(encoding: Encoding, record: Record) -> list[Turn]:
    """Encode a record with its answer, to stand before another: all of it is source and is never cut."""
    task, processor = encoding.task, encoding.processor
    if task.draws or task.produces_no_tokens or task.converses:
        raise UsageError(
            f"The task {task.name} takes no examples: it does not answer in words, or has turns of its own."
        )
    source = encode_source(encoding, record, corrupted=True)
    answer = _encode_target(encoding, record, source.complements)
    asked = Turn("user", [piece._replace(cuttable=False) for piece in source.pieces])
    text = processor.tokenizer.decode(answer) if processor.chat else None
    return [asked, Turn("assistant", [Piece((), text=text) if text else Piece(answer)])]


def _turns(encoding: Encoding, source: Source, shots: Items[list[Turn]]) -> tuple[list[Turn], list[list[Turn]]]:
    """The turns before an answer: those that stay, and groups of which the first are left out where there is no room.
    The last group is the question."""
    chat, own = encoding.processor.chat, source.turns
    asked = own or [Turn("user", source.pieces)]
    text = encoding.system if encoding.system is not None else encoding.task.system or (chat.system if chat else "")
    head = [Turn("system", [spoken(text, encoding.processor)])] if text else []
    if asked[0].role == "system":
        head, asked = [asked[0]], asked[1:]
    groups: list[list[Turn]] = []
    for turn in asked:
        if turn.role == "user" or not groups:
            groups.append([])
        groups[-1].append(turn)
    return head, [*shots, *groups]


def _conversation(encoding: Encoding, record: Record, source: Source, truncate: str | None) -> Sequence:
    """The example of a conversation whose answer, and earlier ones where the model's form allows it, are learned. The
    first turns are left out where there is no room."""
    task, processor = encoding.task, encoding.processor
    slot = task.slots[task.inputs[0]]
    with slot_errors(record, slot):
        answer = record.get(ANSWER) or {"role": "assistant", "content": record.get(task.outputs[0])}
        if answer["content"] is None and ANSWER not in record:
            raise DataError("end with a question: there is no answer to learn.")
        learn = record.get(TURNS, "all") if keeps_turns(processor) else "last"
        last = messages.turns([answer], processor)
        head, groups = _turns(encoding, source, [])
        if not groups or groups[-1][-1].role == "assistant":
            raise DataError("end with an answer, where another one is to be learned.")
        for dropped in range(len(groups)):
            turns = [*head, *(turn for group in groups[dropped:] for turn in group), *last]
            pieces = [
                Piece((processor.tokenizer.pad_id,) * processor.prompt),
                *lay_out_turns(turns, processor, encoding.thinking, record.get("tools") or (), learn),
            ]
            try:
                example = lay_out(pieces, None, processor, task.name, truncate=None)
                break
            except ContextLengthError:
                if dropped == len(groups) - 1:
                    raise
    left_out = [piece for group in groups[:dropped] for turn in group for piece in turn.pieces]
    example.truncated = sum(size_of(piece, processor) for piece in left_out)
    return example


def _lay_out(
    encoding: Encoding,
    record: Record,
    source: Source,
    ids: Items[int] | None,
    shots: Items[Record],
    truncate: str | None,
) -> Sequence:
    """Lay out the example after its shots; in training after the last of them that fit."""
    task, processor = encoding.task, encoding.processor
    prefix = Piece((processor.tokenizer.pad_id,) * processor.prompt)
    tools = record.get("tools") or () if source.turns else ()
    head, every = _turns(encoding, source, [_encode_shot(encoding, shot) for shot in shots])
    reserve, least = int(task.decode.get("max_new_tokens", 0)), 0
    if task.draws and ids is None:
        reserve = 1 + (0 if processor.codec is None else processor.codec.side**2)
        least = 0 if truncate == "end" else reserve
    full = 0
    for dropped in range(len(every)):
        turns = [*head, *(turn for group in every[dropped:] for turn in group)]
        with record_errors(record):
            pieces = [prefix, *lay_out_turns(turns, processor, encoding.thinking, tools)]
        full = full or sum(len(piece.ids) for piece in pieces)
        try:
            found = lay_out(pieces, ids, processor, task.name, reserve, least, truncate)
            break
        except ContextLengthError as error:
            if dropped == len(every) - 1 or (source.turns and truncate is None):
                raise _too_long(encoding, record, source, error, truncate is None and not shots) from None
    if dropped and source.turns:
        found.truncated += full - sum(len(piece.ids) for piece in pieces)
    elif dropped and encoding.rng is None:
        left = len(every) - 1 - dropped
        fit = f"the last {left} of them fit" if left else "none of them fits"
        raise ContextLengthError(
            f"{where(record)}{len(shots)} examples and the record do not fit: they have {full:,} positions, and the "
            f"model takes {processor.max_length:,} (max_length); {fit}.",
            param="examples",
        )
    return found


def _sketch_prompt(encoding: Encoding, record: Record, source: Source, truncate: str | None, lost: int) -> Sequence:
    """The prompt of a task with a sketch. The slot of the sketch is never shortened."""
    task, processor = encoding.task, encoding.processor
    number, end = source.places[task.sketch] + 1, Piece((processor.tokenizer.answer_id,))
    pieces = [Piece((processor.tokenizer.pad_id,) * processor.prompt), *source.pieces, end]
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
    encoding: Encoding,
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
    encoding: Encoding, record: Record, source: Source, error: Exception, is_truncatable: bool
) -> ContextLengthError:
    """The error with the record's place and, for a request that may be truncated, its longest text."""
    every = [size_of(piece, encoding.processor) for piece in source.pieces]
    sizes = {name: every[n] for name, n in source.places.items() if source.pieces[n].cuttable}
    sizes.pop(encoding.task.sketch, None)
    longest, advice = max(sizes, key=lambda name: sizes[name], default=None), ""
    others = sum(every) - sizes.get(longest or "", 0)
    is_request = encoding.max_positions is not None
    if longest and is_request and is_truncatable and others < encoding.processor.max_length - 1:
        advice = (
            f' Shorten {longest}, its longest text ({sizes[longest]:,} positions), or let truncate="start" leave out '
            "its beginning."
        )
    return ContextLengthError(f"{where(record)}{error}{advice}", param=longest)
