"""Task: the inputs and outputs of a model, as an instruction with typed slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from openm6.core.errors import UsageError, cut, suggest
from openm6.tasks import target
from openm6.tasks.grammar import Instruction, Slot, half_width, parse, slots_of
from openm6.tasks.heads import HEADS
from openm6.tasks.processor import Processor
from openm6.tasks.slots import TYPES
from openm6.tasks.slots.label import normalize_label


@dataclass(frozen=True)
class Task:
    """A task of the model.

    instructions   variants of the instruction, all with the same slots; training draws one, inference takes the first
    metrics        metrics of its answers (see `metrics`; also "perplexity")
    decode         defaults of decoding, e.g. {"max_new_tokens": 16}
    labels         closed sets of labels, by slot, where known
    example        one input and its answer, by slot
    aliases        names of data columns that fill a slot besides its own name
    reader         of a task that draws: the task that reads candidates, to rank them; it writes the prompt under
                   the same slot names
    sketch         the slot on the left that the text keeps much of: the text is then generated from a sketch of it, by
                   edits in parallel (see `sketch`), not one token after the other
    system         text before all turns, of models with a chat template in its system role
    slots          slots by name, those of the left first; `inputs` and `outputs` are the names of each side"""

    name: str
    instructions: tuple[Instruction, ...]
    description: str = ""
    metrics: tuple[str, ...] = ()
    decode: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reader: str = ""
    sketch: str = ""
    system: str = ""
    slots: Mapping[str, Slot] = field(init=False, repr=False)
    inputs: tuple[str, ...] = field(init=False)
    outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.instructions:
            raise UsageError(f"The task {self.name} has no instruction.")
        first = self.instructions[0]
        inputs, outputs = slots_of(first.source), slots_of(first.target)
        for other in self.instructions[1:]:
            for side, expected in ((other.source, inputs), (other.target, outputs)):
                if {s.name: s.type for s in slots_of(side).values()} != {s.name: s.type for s in expected.values()}:
                    raise UsageError(
                        f"The task {self.name} has instructions with different slots: "
                        f'"{first.text}" and "{other.text}".'
                    )
        slots = {**outputs, **inputs}
        object.__setattr__(self, "slots", {name: slots[name] for name in (*inputs, *outputs)})
        object.__setattr__(self, "inputs", tuple(inputs))
        object.__setattr__(self, "outputs", tuple(outputs))
        every = [part for i in self.instructions for part in (*i.source, *i.target) if isinstance(part, Slot)]
        if (self.draws or self.produces_no_tokens) and any(len(i.target) > 1 for i in self.instructions):
            what = "picture that is drawn" if self.draws else "vector" if self.embeds else "head's answer"
            raise UsageError(f"The task {self.name}: a {what} stands alone on the right side.")
        if self.converses and any(len(i.source) > 1 for i in self.instructions):
            raise UsageError(f"The task {self.name}: messages stand alone on the left side.")
        if self.sketch:
            given = inputs.get(self.sketch)
            if given is None or given.type not in ("text", "table") or given.drop or given.mask or given.prefix:
                raise UsageError(f"The task {self.name}: sketch names a text or table that is given whole.")
            if [slot.type for slot in outputs.values()] != ["text"] or any(
                len(i.target) > 1 for i in self.instructions
            ):
                raise UsageError(f"The task {self.name}: what is written from a sketch is one text alone.")
        labels = {**{slot.name: slot.labels for slot in every if slot.labels}, **self.labels}
        for name, values in labels.items():
            if name not in self.slots or self.slots[name].type != "label":
                known = [s.name for s in self.slots.values() if s.type == "label"]
                raise UsageError(f"The task {self.name} has no label slot {name}.{suggest(name, known)}")
            # Labels taken from data may repeat; the first occurrence counts.
            labels[name] = tuple(dict.fromkeys(normalize_label(str(value)) for value in values))
            if not all(labels[name]) or not values:
                raise UsageError(f"The task {self.name} has an empty set of labels, or an empty label, for {name}.")
        object.__setattr__(self, "labels", labels)

    @property
    def controls(self) -> int:
        """Number of slots that may be dropped, of a task that draws."""
        return sum(bool(self.slots[name].drop) for name in self.inputs) if self.draws else 0

    @property
    def draws(self) -> bool:
        """Whether the answer is a picture, which stands alone on the right."""
        return any(self.slots[name].type == "image" for name in self.outputs)

    @property
    def embeds(self) -> bool:
        """Whether the answer is a vector: the network's output where the answer would begin, alone on the right."""
        return any(self.slots[name].type == "vector" for name in self.outputs)

    @property
    def converses(self) -> str:
        """The slot of messages, which stands alone on the left; "" of other tasks."""
        return next((name for name in self.inputs if self.slots[name].type == "messages"), "")

    @property
    def head(self) -> str:
        """The slot type of a head's answer; "" of other tasks."""
        return next((kind for name in self.outputs if (kind := self.slots[name].type) in HEADS), "")

    @property
    def produces_no_tokens(self) -> bool:
        """Whether no tokens are generated: the answer is a vector, or a head's."""
        return self.embeds or bool(self.head)

    def without_target(self) -> Task:
        """The task without a target, for records that have no answer yet."""
        labels = {name: values for name, values in self.labels.items() if name in self.inputs}
        instructions = tuple(replace(i, target=()) for i in self.instructions)
        return replace(self, instructions=instructions, labels=labels, sketch="")

    @classmethod
    def from_instruction(
        cls, text: str, name: str | None = None, labels: Mapping[str, Items[str]] | None = None
    ) -> Task:
        """A task from one line: `Task.from_instruction("[image:photo] 是什么? -> [label:kind|set=鞋,包]")`."""
        text = half_width(text)
        return cls(name or text, (parse(text),), labels={k: tuple(v) for k, v in (labels or {}).items()})

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON values."""
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
            "sketch": self.sketch,
            "system": self.system,
        }

    def with_labels(self, labels: Mapping[str, Items[str]]) -> Task:
        """The task with these closed sets, for labels found in the data."""
        return replace(self, labels={**self.labels, **{name: tuple(values) for name, values in labels.items()}})

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises UsageError for an unknown slot or a missing required one."""
        for name in given:
            if name not in self.slots:
                raise UsageError(
                    f"The task {self.name} has no slot {cut(name)}.{suggest(name, self.inputs)} It takes: "
                    f"{', '.join(self.inputs) or 'nothing'}.",
                    param=cut(name),
                )
        for name in self.inputs:
            if name not in given and not self.slots[name].is_optional:
                raise UsageError(f"{name} is missing: the task {self.name} takes {', '.join(self.inputs)}.", param=name)

    def check_draws(self) -> None:
        """Raises UsageError for a task whose answer is not a picture."""
        if not self.draws:
            raise UsageError(f"The task {self.name} does not draw: it writes {', '.join(self.outputs)}.")

    def asked(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a record that are present."""
        return {name: record[name] for name in self.inputs if record.get(name) is not None}

    def read(self, ids: Items[int], processor: Processor) -> dict[str, Any]:
        """The outputs by name, from the ids generated for its first instruction."""
        if processor.chat is not None:
            ids = processor.chat.split_reasoning(list(ids), processor.tokenizer)[1]
        parts = target.split(self.instructions[0].target, ids, processor.tokenizer)
        return {slot.name: TYPES[slot.type].read(found, processor) for slot, found in parts}

    def value(self, ids: Items[int], processor: Processor) -> Any:
        """The value of the one output, or the dict of several, from the generated ids."""
        found = self.read(ids, processor)
        return next(iter(found.values())) if len(found) == 1 else found

    def schema(self) -> dict[str, Any]:
        """JSON schemas of the inputs and of the outputs: `{"inputs": {...}, "outputs": {...}}`."""
        return {"inputs": self._side_schema(self.inputs), "outputs": self._side_schema(self.outputs)}

    def _side_schema(self, names: tuple[str, ...]) -> dict[str, Any]:
        properties = {}
        for name in names:
            properties[name] = TYPES[self.slots[name].type].schema()
            if name in self.labels:
                properties[name]["enum"] = list(self.labels[name])
        required = [name for name in names if not self.slots[name].is_optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def texts(self) -> Iterator[str]:
        """The texts of the task itself, its instructions and labels, which a tokenizer has to know."""
        for instruction in self.instructions:
            for part in (*instruction.source, *instruction.target):
                yield from filter(None, (part,) if isinstance(part, str) else (part.before, part.after))
        for labels in self.labels.values():
            yield from labels
