"""The values of a record for the slots of a task."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.tasks.grammar import Slot
from openm6.tasks.lengths import check_value
from openm6.tasks.slots.choices import as_choices
from openm6.tasks.slots.label import normalize_label
from openm6.tasks.task import Task

Record = Mapping[str, Any]
"""Values by slot name. Readers add `_where`, the record's place in its file."""


def value_of(
    task: Task, record: Record, slot: Slot, rng: np.random.Generator | None = None, max_positions: int | None = None
) -> Any:
    """The value of a slot; of a list of texts one, drawn by `rng` or the first. `max_positions` (of a request): the
    positions of the model, by which the size of the value is checked first. Raises DataError that names the slot."""
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
    if max_positions is not None and slot.type != "image":
        with slot_errors(record, slot):
            check_value(value, max_positions)
    known = labels_of(task, record, slot.name)
    if known and normalize_label(str(value)) not in known:
        whose = "task's" if known is task.labels.get(slot.name) else "record's"
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise DataError(
            f"{where(record)}{slot.name}: {cut(value)!r} is none of the {whose} labels."
            f"{suggest(str(value), known)} They are: {listed}."
        )
    return value


def is_given(record: Record, slot: Slot) -> bool:
    """Whether a record has a value for a slot. For choices and for a slot in a group, such as a column that is filled
    in some rows, an empty text or list is none."""
    value = record.get(slot.name)
    is_additional = slot.is_grouped or slot.type == "choices"
    return value is not None and not (is_additional and isinstance(value, (str, list)) and not value)


def labels_of(task: Task, record: Record, name: str, max_positions: int | None = None) -> tuple[str, ...]:
    """The labels that a slot on the right can have: the choices that the record lists for it, else the task's; () where
    none are known. `max_positions`: as in `value_of`. Raises DataError that names the slot of the choices."""
    for slot in task.slots.values():
        if slot.of == name and is_given(record, slot):
            with slot_errors(record, slot):
                check_value(record[slot.name], max_positions)
                return as_choices(record[slot.name])
    return task.labels.get(name, ())


def where(record: Record) -> str:
    """The record's place as the beginning of an error message; "" if unknown."""
    return f"{record['_where']}: " if "_where" in record else ""


@contextmanager
def slot_errors(record: Record, slot: Slot) -> Iterator[None]:
    """Add the slot to the message of an error, and to a DataError the record's place."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{where(record)}{slot.name}: {error}", param=slot.name) from None
    except UsageError as error:
        raise UsageError(f"{slot}: {error}") from None


@contextmanager
def record_errors(record: Record) -> Iterator[None]:
    """Add the record's place to the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{where(record)}{error}", param=error.param) from None
