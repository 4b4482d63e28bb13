"""Answers for every row of a source, written beside the row's columns; an interrupted run is resumed.

Finished parts are stored in the folder OUTPUT.parts, each written atomically, with a settings.json of data, model, task
and options. At the end the output is written atomically and the folder is removed.
"""

from __future__ import annotations

import glob
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.bases import directory_hash
from openm6.core.errors import DataError, UsageError
from openm6.core.files import dumps, lines_of, lock_output, write_failed, write_file, write_json, write_whole
from openm6.data.columns import SlotView
from openm6.data.digest import json_hash
from openm6.data.rejects import Reject, place_of
from openm6.data.source import open_source
from openm6.data.store import HIDDEN, Record
from openm6.data.writers import writer_for
from openm6.inference.labels import closed_labels
from openm6.inference.modes import mode_of
from openm6.inference.request import Request
from openm6.inference.session import Session
from openm6.studio.review import seed_of
from openm6.tasks.lengths import check_truncate
from openm6.tasks.task import Task

PART = 256
"""Number of rows per part: what an interruption loses at most."""


class Prediction:
    """The answers of `task` to the `total` rows of the source `data`, written into the file `output`.

    Every row gives a row, in order, with its own columns and those of `added` (a dict from an output slot,
    "probability", "probabilities" or "error" to the column's name, which ends in `_predicted` if the data have a column
    of that name). Raises UsageError, before anything is answered, for an output that cannot be written, exists, or was
    started with other data, another model, task or options.
    """

    def __init__(
        self,
        session: Session,
        task: str | Task,
        data: str,
        output: Path,
        *,
        columns: Mapping[str, str] | None = None,
        data_format: str | None = None,
        images: str | None = None,
        decoding: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        all_probabilities: bool = False,
        truncate: str | None = None,
    ):
        self.session, self.task, self.output = session, session.task(task), output
        self.decoding, self.batch_size, self.truncate = dict(decoding or {}), batch_size, truncate
        check_truncate(truncate)
        self.folder = output.with_name(output.name + ".parts")
        mode = mode_of(self.task)
        if mode.result == "picture":
            raise UsageError(f"The task {self.task.name} draws pictures: use `openm6 images batch`.")
        mode.options(session, self.task, Request({}, decoding=self.decoding))
        self._write = writer_for(output, holds_vectors=mode.result == "vector")
        has_labels = bool(closed_labels(self.task))
        if all_probabilities and not has_labels:
            raise UsageError(f"The task {self.task.name} has no probabilities: it has no closed set of labels.")
        self.source = open_source(data, data_format, images)
        self.total = len(self.source) + len(self.source.rejected)
        given = {slot: column for slot, column in (columns or {}).items() if slot not in self.task.outputs}
        self.view = SlotView.of(self.task.without_target(), self.source, given)
        names = [*self.task.outputs, *["probability"] * has_labels, *["probabilities"] * all_probabilities, "error"]
        self.added = {name: self._column(name) for name in names}
        settings = {
            "data": json_hash([self.source.content_hash(), [place_of(r.where)[1] for r in self.source.rejected]]),
            "model": directory_hash(session.path) if session.path else "",
            "task": self.task.to_dict(),
            "options": {"columns": dict(self.view.mapping), "decoding": self.decoding, "added": list(self.added)}
            | ({} if truncate is None else {"truncate": truncate}),
        }
        self._begin(settings, data)

    def _column(self, name: str) -> str:
        for column in (name, f"{name}_predicted"):
            if column not in self.source.columns:
                return column
        raise UsageError(f"The data have columns {name} and {name}_predicted already: rename one of them.")

    def _begin(self, settings: dict[str, Any], data: str) -> None:
        kept = self.folder / "settings.json"
        if not kept.is_file():
            for path in (self.output, self.folder):
                if path.exists():
                    raise UsageError(f"{path} exists already: name another output, or delete it.")
            write_whole(self.folder, lambda draft: write_json(draft / kept.name, settings))
        before = json.loads(kept.read_text("utf-8"))
        what = {"data": f"data ({data} has changed)", "model": "model", "task": "task", "options": "options"}
        for key, now in json.loads(json.dumps(settings)).items():
            if before.get(key) != now:
                raise UsageError(
                    f"{self.output} was started with other {what[key]}: use another file, or delete the folder "
                    f"{self.folder} to start again."
                )

    def run(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
        """Answer the remaining rows and write the output; `on_progress` gets the number of finished rows (those of an
        earlier run included) and of all rows after each part.

        Returns {"output", "records", "answered", "bad", "resumed": rows of an earlier run, "seconds"}. Raises DataError
        if no row could be answered; the output has the reason of each row.
        """
        started, resumed, bad, reason = time.perf_counter(), 0, 0, ""
        try:
            with lock_output(self.output):
                for number, rows in enumerate(self._parts()):
                    file = self.folder / f"{number:08d}.jsonl"
                    if file.is_file():
                        resumed += len(rows)
                    else:
                        text = "".join(dumps(answer) + "\n" for answer in self._answered(rows, number))
                        write_file(file, partial(Path.write_text, data=text, encoding="utf-8"))
                        on_progress(min((number + 1) * PART, self.total), self.total)
                    errors = [one["error"] for one in self._read(number) if one["error"]]
                    bad, reason = bad + len(errors), reason or next(iter(errors), "")
                for stale in self.output.parent.glob(f".{glob.escape(self.output.name)}.writing-*"):
                    stale.unlink()
                own = [name for name in self.source.columns if name not in HIDDEN]
                write_file(self.output, lambda draft: self._write(draft, [*own, *self.added.values()], self._merged))
                shutil.rmtree(self.folder)
        except OSError as error:
            raise write_failed(self.output, error) from None
        if bad == self.total:
            raise DataError(f"None of the {self.total} records could be answered, see {self.output}: {reason}")
        return {
            "output": str(self.output), "records": self.total, "answered": self.total - bad, "bad": bad,
            "resumed": resumed, "seconds": round(time.perf_counter() - started, 2),
        }  # fmt: skip

    def _parts(self) -> Iterator[list[Record | Reject]]:
        rows = self.source.rows()
        while part := list(islice(rows, PART)):
            yield part

    def _read(self, number: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in lines_of((self.folder / f"{number:08d}.jsonl").read_text("utf-8"))]

    def _merged(self) -> Iterator[dict[str, Any]]:
        """The rows of the output."""
        for number, rows in enumerate(self._parts()):
            for row, answer in zip(rows, self._read(number), strict=True):
                own = {} if isinstance(row, Reject) else {k: v for k, v in row.items() if k not in HIDDEN}
                yield {**own, **{column: answer.get(name) for name, column in self.added.items()}}

    def _answered(self, rows: list[Record | Reject], number: int) -> Iterator[dict[str, Any]]:
        """The added values of each row of a part, by the names of `added`."""
        options = {**self.task.decode, **self.decoding}
        if options.get("temperature"):  # otherwise all parts would draw the same random numbers
            options["seed"] = seed_of(int(options.get("seed", 0)), number)
        many: dict[str, Any] = {"batch_size": self.batch_size, "truncate": self.truncate}
        asked = [self._asked(row) for row in rows]
        good = [record for record in asked if not isinstance(record, DataError)]
        found = list(self.session.run_many(self.task, good, decoding=options, on_error="return", **many))
        good = [record for record, answer in zip(good, found, strict=True) if not isinstance(answer, DataError)]
        has_labels = "probability" in self.added
        by_label = iter(self.session.label_probabilities(self.task, good, **many) if has_labels else ())
        answers = iter(found)
        for record in asked:
            answer = record if isinstance(record, DataError) else next(answers)
            if isinstance(answer, DataError):
                yield {"error": str(answer)}
                continue
            given = answer if len(self.task.outputs) > 1 else {self.task.outputs[0]: answer}
            more: dict[str, Any] = {}
            if has_labels:
                every = {label: round(probability, 6) for label, probability in next(by_label).items()}
                more = {"probability": every.get(answer), "probabilities": every}
            yield {**{name: _plain(value) for name, value in given.items()}, **more, "error": None}

    def _asked(self, row: Record | Reject) -> Record | DataError:
        """The inputs of a row by slot, or the error of an invalid row."""
        if isinstance(row, Reject):
            return DataError(row.reason)
        try:
            seen = self.view(row)
        except DataError as error:
            return error
        for name in self.task.inputs:
            if seen.get(name) in (None, "", []) and not self.task.slots[name].is_optional:
                return DataError(f"{row.get('_where', 'The record')} has no {name}.")
        return {name: value for name, value in seen.items() if name not in self.task.outputs}


def _plain(value: Any) -> Any:
    return [round(float(number), 6) for number in value] if isinstance(value, np.ndarray) else value
