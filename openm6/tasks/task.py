"""Task: from a record to a Sequence, and from what the model wrote back to an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from openm6.errors import DataError, UsageError, suggest
from openm6.sequence import Constraint, Sequence
from openm6.tasks import corrupt, drawn, target
from openm6.tasks.forms import Digits, Verse, form_of
from openm6.tasks.grammar import Instruction, Slot, parse
from openm6.tasks.layout import Piece, lay_out
from openm6.tasks.processor import Processor
from openm6.tasks.slots import TYPES, box, image
from openm6.tasks.slots.text import as_text
from openm6.tasks.trie import Trie
from openm6.tokenizer import Tokenizer

Record = Mapping[str, Any]

BY_MASKS = 0.4
"""Share of the drawn pictures that are learned by masks; the others one code after the other."""

UNGUIDED = 0.1
"""Share of the drawn pictures without any of the slots that may be dropped, where there are several: guidance leads
away from what is drawn so."""

JUDGED = 0.05
"""Share of the drawn pictures that are whole, and judged: half of them belong to another record."""

_ANSWERS = 100_000
"""Closed answers (combinations of labels) up to which decoding is kept to them."""


@dataclass(frozen=True)
class Task:
    """What the model is asked to do.

    instructions   variants of the instruction, all with the same slots; training draws one, use takes the first
    metrics        how its answers are measured (see `metrics`; also "perplexity")
    decode         defaults of decoding, e.g. {"max_new_tokens": 16}
    labels         the closed set of each label slot, where it is known
    example        one input, and the answer to it, by slot
    aliases        names of data columns that fill a slot besides its own name
    reader         of a task that draws: the task by which what was drawn is read, to rank candidates; it writes what
                   was asked for under the same slot names
    slots          slot by name, those of the left first; `inputs` and `outputs` are the names of each side
    """

    name: str
    instructions: tuple[Instruction, ...]
    description: str = ""
    metrics: tuple[str, ...] = ()
    decode: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reader: str = ""
    slots: Mapping[str, Slot] = field(init=False, repr=False)
    inputs: tuple[str, ...] = field(init=False)
    outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.instructions:
            raise UsageError(f"The task {self.name} has no instruction.")
        first = self.instructions[0]
        inputs, outputs = _slots(first.source), _slots(first.target)
        for other in self.instructions[1:]:
            for side, expected in ((other.source, inputs), (other.target, outputs)):
                if {s.name: s.type for s in _slots(side).values()} != {s.name: s.type for s in expected.values()}:
                    raise UsageError(
                        f"The task {self.name} has instructions with different slots: "
                        f'"{first.text}" and "{other.text}".'
                    )
        slots = {**outputs, **inputs}
        object.__setattr__(self, "slots", {name: slots[name] for name in (*inputs, *outputs)})
        object.__setattr__(self, "inputs", tuple(inputs))
        object.__setattr__(self, "outputs", tuple(outputs))
        every = [part for i in self.instructions for part in (*i.source, *i.target) if isinstance(part, Slot)]
        if (self.draws or self.embeds) and any(len(i.target) > 1 for i in self.instructions):
            what = "picture that is drawn" if self.draws else "vector"
            raise UsageError(f"The task {self.name}: a {what} stands alone on the right side.")
        labels = {**{slot.name: slot.labels for slot in every if slot.labels}, **self.labels}
        for name, values in labels.items():
            if name not in self.slots or self.slots[name].type != "label":
                known = [s.name for s in self.slots.values() if s.type == "label"]
                raise UsageError(f"The task {self.name} has no label slot {name}.{suggest(name, known)}")
            if not values:
                raise UsageError(f"The task {self.name} has an empty set of labels for {name}.")
        # A label may be met twice (labels taken from data); its place in the set is its first one.
        object.__setattr__(self, "labels", {name: tuple(dict.fromkeys(map(str, v))) for name, v in labels.items()})

    @property
    def _controls(self) -> int:
        """Slots that may be dropped, of a task that draws."""
        return sum(bool(self.slots[name].drop) for name in self.inputs) if self.draws else 0

    @property
    def draws(self) -> bool:
        """Whether the answer is a picture. It then stands alone on the right."""
        return any(self.slots[name].type == "image" for name in self.outputs)

    @property
    def embeds(self) -> bool:
        """Whether the answer is a vector: the network's output where the answer would begin. It stands alone."""
        return any(self.slots[name].type == "vector" for name in self.outputs)

    # Making

    @classmethod
    def from_instruction(
        cls, text: str, name: str | None = None, labels: Mapping[str, Items[str]] | None = None
    ) -> Task:
        """A task from one line: `Task.from_instruction("[image:photo] 是什么? -> [label:kind|set=鞋,包]")`."""
        return cls(name or text, (parse(text),), labels={k: tuple(v) for k, v in (labels or {}).items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Task:
        """A task file. Raises UsageError that names file and key."""
        from openm6.tasks.file import read_task

        return read_task(path)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "The task") -> Task:
        """What `to_dict` gave. Raises UsageError that names the key, after `where`."""
        from openm6.tasks.file import task_of

        return task_of(content, where)

    def to_dict(self) -> dict[str, Any]:
        """Everything of the task as JSON values."""
        return {
            "name": self.name,
            "description": self.description,
            "instructions": [i.text for i in self.instructions],
            "metrics": list(self.metrics),
            "decode": dict(self.decode),
            "labels": {name: list(values) for name, values in self.labels.items()},
            "example": dict(self.example),
            "aliases": {name: list(values) for name, values in self.aliases.items()},
            "reader": self.reader,
        }

    def with_labels(self, labels: Mapping[str, Items[str]]) -> Task:
        """The task with these closed sets, for labels that only the data tells."""
        return replace(self, labels={**self.labels, **{name: tuple(values) for name, values in labels.items()}})

    # From a record to a Sequence

    def encode(
        self,
        record: Record,
        processor: Processor,
        rng: np.random.Generator | None = None,
        with_target: bool = True,
        another: Callable[[], Record] | None = None,
    ) -> Sequence:
        """The Sequence of one record whose keys are the slots' names.

        A task that draws learns verdicts on whole pictures too: those of a record that has them (drawn.ESTIMATES), and
        in training, with `another` record of the same source, whether a picture is the record's own.

        With `rng` (training) it takes any of the instructions and corrupts as they say. Without, the first one, and

        - `with_target=False` (use): the source as it is given, with the gaps written in it; it ends with `<|answer|>`;
        - `with_target=True` (measuring): corrupted too, but alike each time.

        Raises DataError, which names the slot, for a record that cannot be used.
        """
        number = 0 if rng is None or len(self.instructions) == 1 else int(rng.integers(len(self.instructions)))
        instruction = self.instructions[number]
        complements: dict[str, str] = {}
        pieces: list[Piece] = [Piece((processor.tokenizer.pad_id,) * processor.prompt)] if processor.prompt else []
        asked: list[str] = []
        # A verdict is on a picture as the answer to all that was asked for.
        drops = rng if not (self.draws and drawn.verdicts_of(record)) else None
        unguided = drops is not None and self._controls > 1 and drops.random() < UNGUIDED
        after_text = False  # two texts that touch are kept apart
        for part in instruction.source:
            if isinstance(part, str):
                pieces.append(Piece(processor.tokenizer.encode_often(part)))
                after_text = False
                continue
            if part.drop and (
                record.get(part.name) is None or unguided or (drops is not None and drops.random() < part.drop)
            ):
                continue
            value = self._value(record, part, rng)
            try:
                if (part.mask or part.prefix) and (rng is not None or with_target):
                    text = as_text(value)
                    own = rng or corrupt.own_generator(text)
                    value, complements[part.name] = (
                        corrupt.mask(text, part.mask, own) if part.mask else corrupt.prefix(text, own)
                    )
                elif part.mask:
                    value = corrupt.written_gaps(as_text(value))
                piece = TYPES[part.type].source(value, processor)
            except DataError as error:
                raise _bad(record, part, error) from None
            except UsageError as error:
                raise UsageError(f"{part}: {error}") from None
            if after_text and part.type in target.SPOKEN:
                pieces.append(Piece((processor.tokenizer.row_id,)))
            pieces.append(piece)
            asked.append(part.name)
            after_text = part.type in target.SPOKEN
        if not with_target or self.embeds:
            if self.draws:
                count = 0 if processor.codec is None else processor.codec.side**2
                return drawn.begin(lay_out(pieces, None, processor, self.name, count + 1), processor.tokenizer)
            reserve = int(self.decode.get("max_new_tokens", 0))
            prompt = lay_out(pieces, None, processor, self.name, reserve)
            prompt.constraint = self.allowed(processor, record)
            return prompt
        written = {}
        for slot in _slots(instruction.target).values():
            value = complements[slot.name] if slot.name in complements else self._value(record, slot, rng)
            try:
                written[slot.name] = TYPES[slot.type].target(value, processor)
            except DataError as error:
                raise _bad(record, slot, error) from None
            except UsageError as error:
                raise UsageError(f"{slot}: {error}") from None
        wanted = target.join(instruction.target, written, processor.tokenizer)
        sequence = lay_out(pieces, wanted, processor, self.name)
        if not self.draws:
            return sequence
        assert processor.codec is not None
        if sequence.labels[-1] != processor.tokenizer.end_id:
            raise DataError(
                f"{_where(record)}the {len(wanted) - 1} codes of a picture do not fit: the model takes "
                f"{processor.max_length} positions (max_length)."
            )
        codes = np.array(wanted[1:], np.int32)
        sequence.codes = range(len(sequence) - len(codes), len(sequence))
        return self._learned(record, sequence, codes, processor, rng, another, asked)

    def _learned(
        self,
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
                other, slot = another(), self.outputs[0]
                ids = sequence.ids.copy()
                ids[-len(codes) :] = image.target(self._value(other, self.slots[slot], rng), processor)[1:]
                sequence = replace(sequence, ids=ids)
                verdicts["relevance"] = all(other.get(name) == record.get(name) for name in asked)
            if not asked:
                del verdicts["relevance"]
            return drawn.judged(sequence, len(codes), verdicts, tokenizer)
        if rng.random() < BY_MASKS:
            return drawn.by_masks(sequence, codes, codec.side, tokenizer, rng)
        return sequence

    def _value(self, record: Record, slot: Slot, rng: np.random.Generator | None) -> Any:
        value = record.get(slot.name)
        if isinstance(value, list) and slot.type in ("text", "label") and value:
            value = value[0 if rng is None else int(rng.integers(len(value)))]
        if value is None:
            keys = [key for key in record if not key.startswith("_")]
            raise DataError(
                f"{_where(record)}{slot.name} is missing: the task {self.name} needs it, and the record has "
                f"{', '.join(keys) or 'nothing'}.{suggest(slot.name, keys)}"
            )
        known = self.labels.get(slot.name)
        if known and str(value) not in known:
            listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise DataError(
                f"{_where(record)}{slot.name}: {str(value)[:40]!r} is none of the task's labels."
                f"{suggest(str(value), known)} They are: {listed}."
            )
        return value

    # From what was written to an answer

    def read(self, ids: Items[int], processor: Processor) -> dict[str, Any]:
        """The outputs by name, from the ids that the model wrote (its first instruction was asked)."""
        parts = target.split(self.instructions[0].target, ids, processor.tokenizer)
        return {slot.name: TYPES[slot.type].read(found, processor) for slot, found in parts}

    def allowed(self, processor: Processor, record: Record) -> Constraint | None:
        """What may be written, when all outputs are labels of known sets, or the one output is a box or a verse; else
        None. Raises DataError for a form that is none."""
        only = self.slots[self.outputs[0]] if len(self.outputs) == 1 and len(self.instructions[0].target) == 1 else None
        if only and only.type == "box":
            return Digits(box.DIGITS, processor.tokenizer)
        written = next(iter(_slots(self.instructions[0].target).values()))
        if only and written.verse:
            try:
                lines, length = form_of(as_text(self._value(record, self.slots[written.verse], None)))
            except DataError as error:
                raise _bad(record, self.slots[written.verse], error) from None
            return Verse(lines, length, processor.tokenizer)
        sets = [self.labels.get(name, ()) for name in self.outputs]
        if not all(sets) or prod(map(len, sets)) > _ANSWERS:
            return None
        return _trie(self.instructions[0].target, tuple(sets), processor.tokenizer)

    # What the task tells about itself

    def schema(self) -> dict[str, Any]:
        """JSON schemas of the inputs and of the outputs: `{"inputs": {...}, "outputs": {...}}`."""
        return {"inputs": self._side_schema(self.inputs), "outputs": self._side_schema(self.outputs)}

    def _side_schema(self, names: tuple[str, ...]) -> dict[str, Any]:
        properties = {}
        for name in names:
            properties[name] = TYPES[self.slots[name].type].schema()
            if name in self.labels:
                properties[name]["enum"] = list(self.labels[name])
        required = [name for name in names if not self.slots[name].drop]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def texts(self) -> Iterator[str]:
        """The texts of the task itself: its instructions and labels. A tokenizer has to know them."""
        for instruction in self.instructions:
            yield from (part for part in (*instruction.source, *instruction.target) if isinstance(part, str))
        for labels in self.labels.values():
            yield from labels


def _slots(side: Items[Any]) -> dict[str, Slot]:
    return {part.name: part for part in side if isinstance(part, Slot)}


@lru_cache(maxsize=64)
def _trie(side: tuple[Any, ...], sets: tuple[tuple[str, ...], ...], tokenizer: Tokenizer) -> Trie:
    names = list(_slots(side))
    answers = (
        target.join(side, {n: tokenizer.encode(v) for n, v in zip(names, values, strict=True)}, tokenizer)
        for values in product(*sets)
    )
    return Trie(answers, tokenizer.end_id)


def _where(record: Record) -> str:
    return f"{record['_where']}: " if "_where" in record else ""


def _bad(record: Record, slot: Slot, error: DataError) -> DataError:
    return DataError(f"{_where(record)}{slot.name}: {error}")
