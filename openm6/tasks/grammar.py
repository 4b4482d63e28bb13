"""The instruction grammar: one line with the inputs and outputs of a task.

    [image:photo] 图中的商品是什么颜色? -> [text:answer]
    [text:body|mask=0.15] -> [text:body]
    [image:photo] -> 颜色是[label:colour|set=红色,蓝色]
    [table] 写一句文案。{风格: [text:style|drop=0.5]。} -> [text]
    [text] 属于哪一类?{可选: [choices|of=label]。} -> [label]

    instruction := side -> side                     left: inputs; right: outputs, which the model writes
    side        := (plain text | slot | group)*     an empty left side means writing from nothing
    slot        := [TYPE(:name)?(|attribute(=value)?)*]
    group       := {(plain text)? slot (plain text)?}

The default name of a slot is its type. A group, on the left alone, is left out whole where its slot is: one with
`drop`, or one of choices. Blanks around a Chinese text are not part of it; around another one, on the left, one blank
is, where the line has any. A literal `[`, `{` or `}` is written twice.
The idea of typed slots in a line of instruction is OFASys' (arXiv 2212.04408)."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

from openm6.core.errors import UsageError, suggest
from openm6.tasks.slots import TYPES
from openm6.tasks.slots.label import normalize_label

ATTRIBUTES: dict[str, frozenset[str]] = {
    **dict.fromkeys(TYPES, frozenset({"drop"})),
    "text": frozenset({"mask", "prefix", "drop", "verse"}),
    "label": frozenset({"set", "drop"}),
    "choices": frozenset({"of", "drop"}),
}
"""Slot types, and the attributes of each. `mask`, `prefix` and `drop` are corruptions (see `corrupt`) and belong on the
left; `set` lists the labels; `verse` belongs on the right, and names the slot on the left with the form of the text
(see `forms`); `of` belongs to choices, and names the label on the right that is one of them."""

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
    """A typed place in an instruction. `before` and `after` are the plain texts of its group, which go with it."""

    type: str
    name: str
    mask: float = 0.0
    prefix: bool = False
    drop: float = 0.0
    labels: tuple[str, ...] = ()
    verse: str = ""
    of: str = ""
    before: str = ""
    after: str = ""

    @property
    def is_optional(self) -> bool:
        """Whether a record may lack it: it has `drop`, or lists choices, which are also known from the task."""
        return bool(self.drop) or self.type == "choices"

    @property
    def is_grouped(self) -> bool:
        return bool(self.before or self.after)

    def __str__(self) -> str:
        parts = [self.type if self.name == self.type else f"{self.type}:{self.name}"]
        parts += [f"{key}={value!r}" for key, value in (("mask", self.mask), ("drop", self.drop)) if value]
        parts += ["prefix"] if self.prefix else []
        parts += ["set=" + ",".join(self.labels)] if self.labels else []
        parts += [f"{key}={value}" for key, value in (("verse", self.verse), ("of", self.of)) if value]
        return f"[{'|'.join(parts)}]"


Part = str | Slot


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction: its `text`, and its two sides, plain texts and slots in order; `apart`: numbers of the parts of
    the left side before which the line has a blank."""

    text: str
    source: tuple[Part, ...]
    target: tuple[Part, ...]
    apart: frozenset[int] = frozenset()


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
    source = _side(text, 0, arrows[0], True)
    target = _side(text, arrows[0] + 2, len(text), False)
    written = {part.name: (part, place) for part, place in target if isinstance(part, Slot)}
    if not written:
        raise _error(text, len(text), "Nothing is written: the right side has no slot")
    for slot, place in written.values():
        for attribute in _CORRUPTIONS:
            if getattr(slot, attribute):
                raise _error(text, place, f"`{attribute}` belongs to a slot on the left, not to one that is written")
        if slot.type == "choices":
            raise _error(text, place, "choices are given: they belong on the left")
        if slot.verse and slot.verse not in {part.name for part, _ in source if isinstance(part, Slot)}:
            raise _error(text, place, f"verse={slot.verse} names no slot on the left")
    labels = [name for name, (slot, _) in written.items() if slot.type == "label"]
    for part, place in source:
        if isinstance(part, Slot) and part.verse:
            raise _error(text, place, "`verse` belongs to a slot that is written, on the right")
        if isinstance(part, Slot) and part.type == "choices" and part.of not in labels:
            problem = f"choices name a label on the right, as in [choices|of={(*labels, 'label')[0]}]"
            raise _error(text, place, problem)
        if isinstance(part, Slot) and part.name in written and written[part.name][0].type != part.type:
            raise _error(text, place, f"{part.name} is of type {part.type} here and {written[part.name][0].type} there")
    starts = [place if isinstance(part, str) else place - 1 for part, place in source]
    apart = frozenset(number for number, start in enumerate(starts) if number and text[start].isspace())
    return Instruction(text, tuple(part for part, _ in source), tuple(part for part, _ in target), apart)


def write(source: tuple[Part, ...], target: tuple[Part, ...]) -> str:
    """The canonical text of an instruction with these sides; `parse` returns the sides."""
    return f"{_joined(source)} -> {_joined(target)}".strip()


def _joined(parts: Iterable[Part]) -> str:
    """The parts with a blank between them where it is not part of a text."""
    text, is_loose = "", False
    for part in parts:
        written = _written(part)
        text += " " + written if is_loose and not _is_spaced(_beginning(part)) else written
        is_loose = not (isinstance(part, str) and _is_spaced(part))
    return text


def _written(part: Part) -> str:
    if isinstance(part, str):
        return re.sub(r"[\[{}]", r"\g<0>\g<0>", part)
    if not part.is_grouped:
        return str(part)
    inside = _joined(filter(None, (part.before, replace(part, before="", after=""), part.after)))
    return f"{{ {inside}}}" if part.before.startswith("{") else f"{{{inside}}}"  # `{{` would be a literal brace


def _beginning(part: Part) -> str:
    return part if isinstance(part, str) else part.before


def _is_spaced(text: str) -> bool:
    """Whether blanks are part of a text: it has letters, none of them Chinese."""
    return any(map(str.isalpha, text)) and not any(unicodedata.east_asian_width(c) in "WF" for c in text)


def _trimmed(text: str, left: bool = True, right: bool = True) -> str:
    """A plain text, with one blank at its ends where it has blanks there that are part of it (`left`, `right`)."""
    bare = text.strip()
    if not _is_spaced(bare):
        return bare
    return " " * (left and text[0].isspace()) + bare + " " * (right and text[-1].isspace())


def _side(text: str, start: int, stop: int, is_source: bool) -> list[tuple[Part, int]]:
    """The parts of text[start:stop], each with its start. Blanks are part of a text on the left alone."""
    parts: list[tuple[Part, int]] = []
    plain, begun = "", start
    seen: set[str] = set()
    # In a group: the place of its `{`, its slot with its place, the text before the slot.
    opened, grouped, before = -1, None, ""

    def end_text(right: bool) -> None:
        if kept := _trimmed(plain, is_source and bool(parts), is_source and right):
            parts.append((kept, begun))

    place = start
    while place < stop:
        character = text[place]
        if character in "[{}" and text.startswith(character * 2, place, stop):
            plain, place = plain + character, place + 2
        elif character == "[":
            end = text.find("]", place, stop)
            if end < 0 or "[" in text[place + 1 : end]:
                raise _error(text, place, "This `[` is not closed; a literal one is written `[[`")
            slot = _slot(text, place + 1, end)
            if slot.name in seen:
                problem = f"Two slots are called {slot.name}: give each a name, as in [{slot.type}:name]"
                raise _error(text, place, problem)
            seen.add(slot.name)
            if opened >= 0:
                if grouped or not slot.is_optional:
                    what = "a second slot" if grouped else "a slot that is always there"
                    raise _error(text, place, f"A group holds one slot, with `drop` or of choices; this is {what}")
                grouped, before = (slot, place), _trimmed(plain, bool(parts))
            else:
                end_text(right=True)
                parts.append((slot, place))
            plain, place, begun = "", end + 1, end + 1
        elif character == "{":
            if not is_source or opened >= 0:
                what = "holds no group" if opened >= 0 else "belongs on the left"
                raise _error(text, place, f"A group {what}; a literal brace is written `{{{{`")
            end_text(right=False)
            # A blank before a group goes with it.
            plain, opened, place = " " * plain[-1:].isspace(), place, place + 1
        elif character == "}":
            if opened < 0:
                raise _error(text, place, "This `}` closes no group; a literal one is written `}}`")
            if grouped is None:
                raise _error(text, opened, "A group holds one slot, with `drop` or of choices; this has none")
            after = _trimmed(plain, right=False)
            parts.append((replace(grouped[0], before=before, after=after), grouped[1]))
            plain, place, begun, opened, grouped = "", place + 1, place + 1, -1, None
        else:
            plain, place = plain + character, place + 1
    if opened >= 0:
        raise _error(text, opened, "This `{` is not closed; a literal one is written `{{`")
    end_text(right=False)
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
        elif key in ("verse", "of"):
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
