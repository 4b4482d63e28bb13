"""The values of a record for the slots of a task."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.tasks.grammar import Slot
from openm6.tasks.lengths import check_value
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
    known = task.labels.get(slot.name)
    if known and normalize_label(str(value)) not in known:
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise DataError(
            f"{where(record)}{slot.name}: {cut(value)!r} is none of the task's labels."
            f"{suggest(str(value), known)} They are: {listed}."
        )
    return value


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
