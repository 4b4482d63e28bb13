"""Answer every record of a source and score the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openm6.bundle import Bundle
from openm6.errors import DataError, UsageError
from openm6.sequence import Sequence
from openm6.tasks.faithful import FAITHFUL
from openm6.tasks.metrics import Score, bootstrap, score, score_of
from openm6.tasks.slots.box import as_box
from openm6.tasks.slots.table import cells_of
from openm6.tasks.task import Task

Record = Mapping[str, Any]


@dataclass(slots=True)
class Case:
    """One evaluated record: what was asked, what came, what was wanted."""

    record: Record
    answer: str
    references: list[str]


@dataclass(slots=True)
class Evaluation:
    task: str
    source: str
    scores: dict[str, Score]
    cases: list[Case] = field(repr=False)
    seconds: float = 0.0
    rejected: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)  # slot of the task's left side: its type
    cut: int = 0  # records whose source was longer than the model takes

    def values(self) -> dict[str, float]:
        return {name: s.value for name, s in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        scores = {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.n} for n, s in self.scores.items()}
        return {
            "task": self.task, "source": self.source, "records": len(self.cases), "rejected": self.rejected,
            "cut": self.cut, "seconds": round(self.seconds, 2), "scores": scores,
        }  # fmt: skip


def evaluate(
    bundle: Bundle,
    task: Task,
    records: Iterable[Record],
    source: str = "",
    *,
    batch_size: int = 64,
    decoding: Mapping[str, Any] | None = None,
    answers: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure `task` on records whose keys are the task's slots (see `openm6.data.columns`).

    Without `answers` nothing is answered that no metric asks for; of a task that draws, never.

    A list as the value of an output slot means several references, each of them right. Records that cannot be
    encoded are counted, not answered. Raises DataError when none is left.
    """
    started = time.perf_counter()
    if task.embeds:
        raise UsageError(f"The task {task.name} gives a vector: it is measured against another task that does.")
    output = task.outputs[0]
    kind = task.slots[output].type
    kept: list[Record] = []
    prompts: list[Sequence] = []
    rejected, reason = 0, "there are no records"
    for record in records:
        try:
            if record.get(output) in (None, "", []):
                raise DataError(f"{record.get('_where', 'a record')} has no {output} to compare with.")
            prompts.append(bundle.prompt(task, record))
            kept.append(record)
        except DataError as error:
            rejected, reason = rejected + 1, str(error)
    if not kept:
        raise DataError(f"Nothing to evaluate in {source or 'the data'}: {reason}")
    cases, cut = [], sum(prompt.cut > 0 for prompt in prompts)
    bundle.model.eval()
    if task.draws or not (answers or set(task.metrics) - {"perplexity"}):
        cases = [Case(record, "", []) for record in kept]
        prompts = []
    if task.head:
        found = bundle.run_many(task, kept, batch_size=batch_size)
        cases = [Case(r, str(a), references(r[output], kind)) for r, a in zip(kept, found, strict=True)]
        prompts = []
    for start in range(0, len(prompts), 4 * batch_size):
        part = slice(start, start + 4 * batch_size)
        for record, generated in zip(
            kept[part], bundle.generate(task, prompts[part], batch_size, decoding), strict=True
        ):
            answer = task.read(generated.ids, bundle.processor)[output]
            cases.append(Case(record, str(answer), references(record[output], kind)))
        if on_progress:
            on_progress(len(cases))
    scores = {
        metric: perplexity(bundle, task, kept, batch_size) if metric == "perplexity" else scored(task, metric, cases)
        for metric in task.metrics
    }
    inputs = {name: task.slots[name].type for name in task.inputs}
    return Evaluation(task.name, source, scores, cases, time.perf_counter() - started, rejected, inputs, cut)


def scored(task: Task, metric: str, cases: list[Case]) -> Score:
    """A metric of a task, other than perplexity, by what was answered."""
    given, wanted = [c.answer for c in cases], [c.references for c in cases]
    if metric in FAITHFUL:
        return score_of(FAITHFUL[metric](given, wanted, [_cells(task, case.record) for case in cases]))
    return score(metric, given, wanted)


def _cells(task: Task, record: Record) -> list[str]:
    """The values of the tables that were given."""
    tables = (record.get(name) for name in task.inputs if task.slots[name].type == "table")
    return [value for table in tables for _, value in cells_of(table)]


def references(value: Any, kind: str = "text") -> list[str]:
    """What is right: of a list of texts or labels each, of any other slot type the value itself."""
    if isinstance(value, (list, tuple)) and kind in ("text", "label"):
        return [str(v) for v in value]
    return [str(as_box(value) if kind == "box" else value)]


def perplexity(bundle: Bundle, task: Task, records: list[Record], batch_size: int = 64) -> Score:
    """exp of the mean negative log-probability of the target's tokens (the end token too), with a bootstrap
    interval over records. Of several references the first is scored."""
    output = task.outputs[0]
    kind = task.slots[output].type
    first = records if kind == "image" else [{**r, output: references(r[output], kind)[0]} for r in records]
    losses, counts = (found.numpy() for found in bundle.target_losses(task, first, batch_size))
    low, high = bootstrap(len(losses), lambda rows: math.exp(losses[rows].sum() / max(1, counts[rows].sum())))
    return Score(math.exp(losses.sum() / counts.sum()), low, high, len(losses))
