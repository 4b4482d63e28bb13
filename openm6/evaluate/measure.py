"""Evaluation: answer every record and score the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.core.extras import require
from openm6.core.files import dumps
from openm6.data.rejects import Reject
from openm6.evaluate.labels import LabelFigures, unknown_references
from openm6.inference.modes import mode_of
from openm6.inference.request import Prepared, Request
from openm6.inference.session import Session
from openm6.tasks.faithful import FAITHFUL
from openm6.tasks.metrics import LIBRARIES, Score, Values, check_metric, score_of, values_of
from openm6.tasks.record import Record
from openm6.tasks.slots.box import as_box
from openm6.tasks.slots.table import cells_of
from openm6.tasks.task import Task


@dataclass(slots=True)
class Case:
    """An evaluated record with its answer and references."""

    record: Record
    answer: str
    references: list[str]


@dataclass(slots=True)
class Evaluation:
    """The result of an evaluation of n cases.

    rejects    rejected records, each with the number of cases before it
    examples   score of each case [n] by metric, NaN for metrics of the whole corpus
    notes      sentences on what the figures leave out
    """

    task: str
    source: str
    scores: dict[str, Score]
    cases: list[Case] = field(repr=False)
    seconds: float = 0.0
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    inputs: Mapping[str, str] = field(default_factory=dict)  # type of each input slot
    examples: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    labels: LabelFigures | None = None
    notes: list[str] = field(default_factory=list)
    cut: int = 0  # number of truncated records

    @property
    def rejected(self) -> int:
        return len(self.rejects)

    def values(self) -> dict[str, float]:
        return {name: s.value for name, s in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        scores = {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.n} for n, s in self.scores.items()}
        return {
            "task": self.task, "source": self.source, "records": len(self.cases), "rejected": self.rejected,
            "cut": self.cut, "seconds": round(self.seconds, 2), "scores": scores, "notes": self.notes,
            **(self.labels.to_dict() if self.labels else {}),
        }  # fmt: skip


def check_metrics(task: Task, metrics: Items[str] = ()) -> None:
    """Raises UsageError if `evaluate` cannot measure a task by these metrics, by default its own."""
    if mode_of(task).result == "vector":
        raise UsageError(f"The task {task.name} gives a vector: it is measured against another task that does.")
    if not metrics and not task.metrics and task.slots[task.outputs[0]].type != "label":
        raise UsageError(f"The task {task.name} has no metrics: choose one by --metric.")
    for metric in metrics or task.metrics:
        check_metric(metric, task)
        if metric in LIBRARIES:
            require(*LIBRARIES[metric])


def evaluate(
    session: Session,
    task: Task,
    records: Iterable[Record | Reject],
    source: str = "",
    *,
    examples: Items[Record] = (),
    batch_size: int = 64,
    decoding: Mapping[str, Any] | None = None,
    answers: bool = True,
    metrics: Items[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
    truncate: str | None = None,
) -> Evaluation:
    """Evaluate `task` on records whose keys are its slots (see `openm6.data.columns`), by `metrics` or by the task's
    own ones and, for labels, macro F1.

    Without `answers` nothing is generated that no metric needs; a task that draws never generates. `examples`: records
    with answers that stand before every record. `on_progress` gets the number of answered and of all records.

    A list as the value of an output slot holds several references. Records that cannot be encoded are counted as
    rejected, as is a Reject in the place of a record. Records that are too long for the model are rejected and named in
    the notes; with `truncate="start"` they lose the beginning of their longest text instead. Raises DataError if no
    record is left, UsageError for a metric that does not suit the task.
    """
    started = time.perf_counter()
    check_metrics(task, metrics)
    output = task.outputs[0]
    kind = task.slots[output].type
    chosen = list(dict.fromkeys(metrics or task.metrics))
    kept: list[Record] = []
    items: list[Prepared] = []
    rejects: list[tuple[int, Reject]] = []
    long: list[str] = []
    cut, draws = 0, mode_of(task).result == "picture"
    for record in records:
        if isinstance(record, Reject):
            rejects.append((len(kept), record))
            continue
        try:
            if record.get(output) in (None, "", []):
                raise DataError(f"{record.get('_where', 'a record')} has no {output} to compare with.")
            request = Request(record, examples, truncate=truncate, decoding=decoding or {})
            if draws:  # nothing is drawn here: a record without a slot to draw by can be measured too
                cut += session.prompt(task, request).truncated > 0
            else:
                items.append(session.prepare(task, request, len(kept)))
                cut += items[-1].prompt.truncated > 0
            kept.append(record)
        except DataError as error:
            if isinstance(error, ContextLengthError):
                long.append(str(record.get("_where", "a record")))
            rejects.append((len(kept), Reject(str(record.get("_where", "")), str(error))))
    if not kept:
        reason = rejects[-1][1].reason if rejects else "there are no records"
        raise DataError(f"Nothing to evaluate in {source or 'the data'}: {reason}")
    session.model.eval()
    cases: list[Case] = []
    if draws or not (answers or set(chosen) - {"perplexity"}):
        cases, items = [Case(record, "", []) for record in kept], []
    for start in range(0, len(items), 4 * batch_size):
        part = slice(start, start + 4 * batch_size)
        for record, found in zip(kept[part], session.answers(task, items[part], batch_size), strict=True):
            answer = found.value if len(task.outputs) == 1 else found.value[output]
            cases.append(Case(record, as_said(answer, kind), references(record[output], kind)))
        if on_progress:
            on_progress(len(cases), len(items))
    labels, notes = None, []
    if len(task.outputs) > 1:
        notes.append(f"Only {output} is measured, not {', '.join(task.outputs[1:])}.")
    if cut:
        notes.append(f"{cut} of {len(kept)} records were too long for the model and were truncated at their start.")
    if long:
        notes.append(too_long(long, len(kept) + len(rejects), session.processor.max_length))
    if kind == "label" and cases[0].references:
        given, wanted, known = [c.answer for c in cases], [c.references for c in cases], task.labels.get(output, ())
        labels = LabelFigures.of(given, wanted, known)
        if known and (note := unknown_references(wanted, known, task.name)):
            notes.append(note)
        if not metrics and "macro_f1" not in chosen:
            chosen.append("macro_f1")
    values = {}
    for metric in chosen:
        is_loss = metric == "perplexity"
        values[metric] = (
            _perplexity(session, task, kept, batch_size, truncate) if is_loss else _values(task, metric, cases)
        )
    return Evaluation(
        task.name, source, {name: score_of(found) for name, found in values.items()}, cases,
        time.perf_counter() - started, rejects, {name: task.slots[name].type for name in task.inputs},
        {name: found.examples for name, found in values.items()}, labels, notes, cut,
    )  # fmt: skip


def too_long(places: list[str], records: int, positions: int) -> str:
    """A note on records that were rejected for their length."""
    named = ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
    return (
        f"{len(places)} of {records} records are longer than the model's {positions:,} positions and were rejected "
        f'({named}); truncate="start" cuts their beginnings instead.'
    )


def scored(task: Task, metric: str, cases: list[Case]) -> Score:
    """A metric of a task, other than perplexity, computed from its answers."""
    return score_of(_values(task, metric, cases))


def _values(task: Task, metric: str, cases: list[Case]) -> Values:
    given, wanted = [c.answer for c in cases], [c.references for c in cases]
    if metric in FAITHFUL:
        return FAITHFUL[metric](given, wanted, [_cells(task, case.record) for case in cases])
    return values_of(metric, given, wanted)


def _cells(task: Task, record: Record) -> list[str]:
    """The cells of the input tables of a record."""
    tables = (record.get(name) for name in task.inputs if task.slots[name].type == "table")
    return [value for table in tables for _, value in cells_of(table)]


def references(value: Any, kind: str = "text") -> list[str]:
    """The references in a value: each text or label of a list, for other slot types the value itself."""
    if isinstance(value, (list, tuple)) and kind in ("text", "label"):
        return [str(v) for v in value]
    return [as_said(as_box(value) if kind == "box" else value, kind)]


def as_said(value: Any, kind: str) -> str:
    """An answer as the text that metrics compare: a table and triples as JSON."""
    return dumps(value) if kind in ("table", "triples") and not isinstance(value, str) else str(value)


def _perplexity(
    session: Session, task: Task, records: list[Record], batch_size: int = 64, truncate: str | None = None
) -> Values:
    """exp of the mean negative log-probability of the target's tokens, the end token included, for the first
    reference."""
    output = task.outputs[0]
    kind = task.slots[output].type
    first = records if kind == "image" else [{**r, output: references(r[output], kind)[0]} for r in records]
    losses, counts = (found.numpy() for found in session.target_losses(task, first, batch_size, truncate))
    return Values(
        np.exp(losses / np.maximum(1, counts)), lambda rows: math.exp(losses[rows].sum() / max(1, counts[rows].sum()))
    )
