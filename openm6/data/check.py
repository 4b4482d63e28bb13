"""Whether data can be used for a task: every record opened as training would open it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from openm6.data.classes import Classes
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.data.store import Record
from openm6.errors import DataError
from openm6.images import open_image
from openm6.tasks.preview import plain_processor, preview

if TYPE_CHECKING:
    from openm6.tasks.task import Task

EXAMPLES = 3
"""Records that are shown as they will be trained."""


class Check:
    """`for record in check.records(): check.look(record)`, then `to_dict()`. `command` is what a user
    types to check these data.

    Raises UsageError where a slot has no column, DataError for data that cannot be opened at all.
    """

    def __init__(
        self,
        source: str,
        task: Task,
        columns: Mapping[str, str],
        data_format: str | None = None,
        images: str | None = None,
        limit: int | None = None,
        command: str | None = None,
    ):
        self.task = task
        self._source = open_source(source, data_format, images, limit=limit)
        self._view = SlotView.of(task, self._source, columns, command)
        self.total = len(self._source)
        self._good = 0
        self._lengths: dict[str, list[int]] = {}
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._classes = {name: Classes() for name, slot in task.slots.items() if slot.type == "label"}
        self._examples: list[dict[str, str]] = []
        for reject in self._source.rejected:
            self._problem(reject.where, reject.reason)

    def records(self) -> Iterator[Record]:
        return iter(self._source)

    def look(self, record: Record) -> None:
        try:
            seen = self._view(record)
            for name, slot in self.task.slots.items():
                value = seen.get(name)
                if slot.type == "vector" or (value is None and slot.drop):
                    continue
                if value is None or value == "":
                    raise DataError(f"{name} is missing.")
                if slot.type == "image":
                    open_image(value)
                elif slot.type in ("text", "label"):
                    self._text(name, value)
            if len(self._examples) < EXAMPLES:
                given, wanted = preview(self.task, seen, plain_processor())
                self._examples.append({"where": str(record.get("_where", "?")), "source": given, "target": wanted})
        except DataError as error:
            self._problem(str(record.get("_where", "?")), str(error))
        else:
            self._good += 1
            for name, classes in self._classes.items():
                classes.add(record.get(self._view.mapping.get(name, "")))

    def _text(self, name: str, value: Any) -> None:
        texts = value if isinstance(value, list) else [value]
        known = self.task.labels.get(name)
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"{name} has to be a text, not {type(text).__name__}.")
            if known and text not in known:
                raise DataError(f"{name} is {text[:40]!r}, none of the task's labels: {', '.join(known[:10])}.")
            self._lengths.setdefault(name, []).append(len(text))

    def _problem(self, where: str, reason: str) -> None:
        # The same fault reads alike wherever it is.
        reason = reason.replace(where, "").replace(where.rsplit(":", 1)[0], "").strip(" :")
        self._counts[reason] += 1
        self._first.setdefault(reason, where)

    def sentences(self) -> list[str]:
        """What is said of the labels."""
        return [text for name, classes in self._classes.items() for text in classes.sentences(name)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "records": self.total + len(self._source.rejected),
            "good": self._good,
            "columns": {n: self._view.mapping.get(n) for n, s in self.task.slots.items() if s.type != "vector"},
            "examples": self._examples,
            "characters": {
                name: {"median": int(statistics.median(lengths)), "longest": max(lengths)}
                for name, lengths in self._lengths.items()
            },
            "classes": {name: classes.to_dict() for name, classes in self._classes.items()},
            "problems": [
                {"reason": reason, "count": count, "where": self._first[reason]}
                for reason, count in self._counts.most_common(20)
            ],
        }
