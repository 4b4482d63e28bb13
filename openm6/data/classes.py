"""The classes of a label: frequency and spellings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openm6.data.columns import SlotView
from openm6.data.store import Record
from openm6.tasks.slots.label import normalize_label

if TYPE_CHECKING:
    from openm6.data.source import Source
    from openm6.tasks.task import Task

_SHOWN = 20
"""Maximum number of classes listed by name."""


@dataclass(slots=True)
class Classes:
    """The classes of one label slot: `counts` by class, and `respelled`, the class of every label with another spelling
    (see normalize_label)."""

    counts: Counter[str] = field(default_factory=Counter)
    respelled: dict[str, str] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Count the label of a record, or each of a list."""
        for text in value if isinstance(value, list) else [value]:
            label = normalize_label(str(text)) if isinstance(text, (str, int, float)) else ""
            if label:
                self.counts[label] += 1
                if label != str(text):
                    self.respelled[str(text)] = label

    def alike(self) -> list[list[str]]:
        """Classes that differ by case and blanks alone, which probably should be one."""
        groups: dict[str, list[str]] = {}
        for label in self.counts:
            groups.setdefault("".join(label.casefold().split()), []).append(label)
        return [sorted(group) for group in groups.values() if len(group) > 1]

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts.most_common()), "respelled": self.respelled, "alike": self.alike()}

    def sentences(self, name: str) -> list[str]:
        """Sentences about the classes of the slot `name`."""
        listed = ", ".join(f"{label} {count:,}" for label, count in self.counts.most_common(_SHOWN))
        more = f" and {len(self.counts) - _SHOWN:,} more" if len(self.counts) > _SHOWN else ""
        classes = f"{len(self.counts):,} class{'es' if len(self.counts) != 1 else ''}"
        said = [f"{name} has {classes}: {listed}{more}."]
        if self.respelled:
            text, label = next(iter(self.respelled.items()))
            count = len(self.respelled)
            said.append(f"{name}: spellings that are taken for a class: {count:,}, such as {text!r} for {label!r}.")
        said += [
            f"{name}: {' and '.join(map(repr, group))} differ in capitals or blanks alone."
            for group in self.alike()[:_SHOWN]
        ]
        return said


def count_classes(task: Task, records: Source, columns: Mapping[str, str]) -> dict[str, Classes]:
    """The classes of each label that the task writes, by slot, from all records."""
    names = [name for name in task.outputs if task.slots[name].type == "label"]
    mapping = SlotView.of(task, records, columns).mapping if names else {}
    found = {name: Classes() for name in names}
    some: Iterable[Record] = records if names else ()
    for record in some:
        for name in names:
            found[name].add(record.get(mapping[name]))
    return found
