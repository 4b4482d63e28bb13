"""The instruction grammar: one line with the inputs and outputs of a task.

    [image:photo] 图中的商品是什么颜色? -> [text:answer]
    [text:body|mask=0.15] -> [text:body]
    [image:photo] -> 颜色是[label:colour|set=红色,蓝色]

    instruction := side -> side             left: inputs; right: outputs, which the model writes
    side        := (plain text | slot)*     an empty left side means writing from nothing
    slot        := [TYPE(:name)?(|attribute(=value)?)*]

The default name of a slot is its type. Blanks around a plain text are not part of it. A literal `[` is written `[[`.
The idea of typed slots in a line of instruction is OFASys' (arXiv 2212.04408)."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from openm6.core.errors import UsageError, suggest
from openm6.tasks.slots import TYPES
from openm6.tasks.slots.label import normalize_label

ATTRIBUTES: dict[str, frozenset[str]] = {
    **dict.fromkeys(TYPES, frozenset({"drop"})),
    "text": frozenset({"mask", "prefix", "drop", "verse"}),
    "label": frozenset({"set", "drop"}),
}
"""Slot types, and the attributes of each. `mask`, `prefix` and `drop` are corruptions (see `corrupt`) and belong on the
left; `set` lists the labels; `verse` belongs on the right, and names the slot on the left with the form of the text
(see `forms`)."""

_CORRUPTIONS = ("mask", "prefix", "drop")
RESERVED = frozenset(
    {
        "self", "task", "decoding", "examples", "limits", "candidates", "kept", "drawn", "adapter", "max_new_tokens",
        "truncate", "system", "thinking",
    }
)  # fmt: skip
"""Names that no slot can have: the other parameters of methods that take slots as keywords (`Session.run`,
`Client.draw` ...). These lie in higher layers, so a test compares the list with their signatures."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A typed place in an instruction."""

    type: str
    name: str
    mask: float = 0.0
    prefix: bool = False
    drop: float = 0.0
    labels: tuple[str, ...] = ()
    verse: str = ""

    def __str__(self) -> str:
        parts = [self.type if self.name == self.type else f"{self.type}:{self.name}"]
        parts += [f"{key}={value!r}" for key, value in (("mask", self.mask), ("drop", self.drop)) if value]
        parts += ["prefix"] if self.prefix else []
        parts += ["set=" + ",".join(self.labels)] if self.labels else []
        parts += [f"verse={self.verse}"] if self.verse else []
        return f"[{'|'.join(parts)}]"


Part = str | Slot


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction: its `text`, and its two sides, plain texts and slots in order."""

    text: str
    source: tuple[Part, ...]
    target: tuple[Part, ...]


_HALF_WIDTH = str.maketrans("？！：；（）", "?!:;()")


def half_width(text: str) -> str:
    """An instruction with half-width forms of `？！：；（）`, as in the library's tasks (commas and full stops stay).
    For instructions that people write; those stored with a trained model stay as they were in training."""
    return text.translate(_HALF_WIDTH)


def slots_of(side: Iterable[Part]) -> dict[str, Slot]:
    """The slots of one side by their names, in their order."""
    return {part.name: part for part in side if isinstance(part, Slot)}


def parse(text: str) -> Instruction:
    """Read an instruction. Raises UsageError that shows the line with a mark under the place."""
    arrows = [i for i in range(len(text)) if text.startswith("->", i)]
    if not arrows:
        raise _error(text, len(text), "The instruction has no `->` between what is given and what is written")
    if len(arrows) > 1:
        raise _error(text, arrows[1], "The instruction has a second `->`")
    source = _side(text, 0, arrows[0])
    target = _side(text, arrows[0] + 2, len(text))
    written = {part.name: (part, place) for part, place in target if isinstance(part, Slot)}
    if not written:
        raise _error(text, len(text), "Nothing is written: the right side has no slot")
    for slot, place in written.values():
        for attribute in _CORRUPTIONS:
            if getattr(slot, attribute):
                raise _error(text, place, f"`{attribute}` belongs to a slot on the left, not to one that is written")
        if slot.verse and slot.verse not in {part.name for part, _ in source if isinstance(part, Slot)}:
            raise _error(text, place, f"verse={slot.verse} names no slot on the left")
    for part, place in source:
        if isinstance(part, Slot) and part.verse:
            raise _error(text, place, "`verse` belongs to a slot that is written, on the right")
        if isinstance(part, Slot) and part.name in written and written[part.name][0].type != part.type:
            raise _error(text, place, f"{part.name} is of type {part.type} here and {written[part.name][0].type} there")
    return Instruction(text, tuple(part for part, _ in source), tuple(part for part, _ in target))


def write(source: tuple[Part, ...], target: tuple[Part, ...]) -> str:
    """The canonical text of an instruction with these sides; `parse` returns the sides."""
    left, right = (
        " ".join(str(part) if isinstance(part, Slot) else part.replace("[", "[[") for part in side)
        for side in (source, target)
    )
    return f"{left} -> {right}".strip()


def _side(text: str, start: int, stop: int) -> list[tuple[Part, int]]:
    """The parts of text[start:stop], each with its start."""
    parts: list[tuple[Part, int]] = []
    plain, begun = "", start
    seen: set[str] = set()
    place = start
    while place < stop:
        if text.startswith("[[", place, stop):
            plain, place = plain + "[", place + 2
        elif text[place] == "[":
            end = text.find("]", place, stop)
            if end < 0 or "[" in text[place + 1 : end]:
                raise _error(text, place, "This `[` is not closed; a literal one is written `[[`")
            if plain.strip():
                parts.append((plain.strip(), begun))
            slot = _slot(text, place + 1, end)
            if slot.name in seen:
                problem = f"Two slots are called {slot.name}: give each a name, as in [{slot.type}:name]"
                raise _error(text, place, problem)
            seen.add(slot.name)
            parts.append((slot, place))
            plain, place, begun = "", end + 1, end + 1
        else:
            plain, place = plain + text[place], place + 1
    if plain.strip():
        parts.append((plain.strip(), begun))
    return parts


def _slot(text: str, start: int, stop: int) -> Slot:
    """Parse the slot in text[start:stop], between its brackets."""
    head, *attributes = text[start:stop].split("|")
    kind, colon, name = head.partition(":")
    if kind not in ATTRIBUTES:
        problem = f"There is no slot type {kind!r}.{suggest(kind, set(ATTRIBUTES))} There are: {', '.join(ATTRIBUTES)}"
        raise _error(text, start, problem)
    name = name if colon else kind
    if not name.isidentifier() or name.startswith("_") or name in RESERVED:
        problem = f"{name!r} cannot name a slot: take letters, digits and _, a letter first"
        raise _error(text, start + len(kind) + 1, f"{name!r} is reserved" if name in RESERVED else problem)
    found: dict[str, float | bool | str | tuple[str, ...]] = {}
    place = start + len(head) + 1
    for attribute in attributes:
        key, equals, value = attribute.partition("=")
        if key not in ATTRIBUTES[kind]:
            known = ATTRIBUTES[kind]
            problem = f"A {kind} slot has no attribute {key!r}.{suggest(key, set(known))}"
            raise _error(text, place, f"{problem} It can have: {', '.join(sorted(known))}")
        if key in found or (key == "set" and "labels" in found):
            raise _error(text, place, f"{key} is given twice")
        if key == "prefix":
            if equals:
                raise _error(text, place + len(key), "prefix takes no value")
            found[key] = True
        elif key == "verse":
            found[key] = value.strip()
        elif key == "set":
            labels = tuple(map(normalize_label, value.split(",")))
            if not all(labels) or len(set(labels)) < len(labels):
                raise _error(text, place, "set lists different labels, as in set=红色,蓝色")
            found["labels"] = labels
        else:
            found[key] = _fraction(text, place, key, value)
        place += len(attribute) + 1
    if "mask" in found and "prefix" in found:
        raise _error(text, start, "mask and prefix exclude each other")
    return Slot(kind, name, **found)  # type: ignore[arg-type]


def _fraction(text: str, place: int, key: str, value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        problem = f"{key} is a fraction above 0 and up to 1, as in {key}=0.15, not {value!r}"
        raise _error(text, place + len(key) + 1, problem)
    return fraction


def _error(text: str, place: int, problem: str) -> UsageError:
    """An error with the problem, the instruction, and a mark under character `place` (wide characters count twice)."""
    line = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    blank = "".join("\u3000" if unicodedata.east_asian_width(c) in "WF" else " " for c in line[:place])
    return UsageError(f"{problem} (column {place + 1}).\n  {line}\n  {blank}^")
