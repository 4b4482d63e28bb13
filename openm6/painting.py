"""What a model draws: candidates, ranked by its own estimates and by reading them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from openm6.candidates import Painting
from openm6.decode.draw import Codes, Drawing, draw_steps, estimate, kept_codes
from openm6.decode.many import answer_groups
from openm6.decode.steps import Steps, finish, recounted
from openm6.errors import UsageError
from openm6.tasks.drawn import ESTIMATES
from openm6.tasks.task import Task

if TYPE_CHECKING:
    from openm6.bundle import Bundle

Record = Mapping[str, Any]
T = TypeVar("T")

KEPT = "_kept"
"""In a record of a task that draws: the codes that are given."""


def draw_many(
    bundle: Bundle,
    task: str | Task,
    records: Iterable[Record],
    *,
    candidates: int = 1,
    batch_size: int = 64,
    decoding: Mapping[str, Any] | None = None,
    on_error: str = "raise",
) -> Iterator[list[Painting]]:
    """For each record `candidates` pictures of a task that draws, the best by the model's own estimates first.

    `decoding` overrides the task's options (see Drawing). A record may have codes that are given (KEPT).
    `on_error`: see Bundle.run_many.
    """
    task, options = options_of(bundle, task, candidates, decoding)

    def check(record: Record) -> Record:
        bundle.prompt(task, record)
        kept_codes([record.get(KEPT)], _codes(bundle))
        return record

    def paint(wishes: list[Record], numbers: list[int]) -> list[list[Painting]]:
        every = [number * candidates + one for number in numbers for one in range(candidates)]
        with bundle.precision():
            return finish(paint_steps(bundle, task, wishes, candidates, options, every))

    yield from answer_groups(records, max(1, batch_size // candidates), check, paint, on_error)


def options_of(
    bundle: Bundle, task: str | Task, candidates: int, decoding: Mapping[str, Any] | None
) -> tuple[Task, Drawing]:
    """The task and how it is drawn. Raises UsageError for what cannot be."""
    task = drawing_task(bundle, task)
    if decoding and int(decoding.get("branches", 1)) > 1:
        decoding = in_passes(task, decoding)
    options = Drawing.of(**{**task.decode, **(decoding or {})})
    if options.guidance and not _droppable(task):
        raise UsageError(f"The task {task.name} has no slot that can be dropped: guidance has nothing to leave.")
    if candidates < 1:
        raise UsageError(f"candidates is {candidates}; draw 1 or more.")
    return task, options


def _droppable(task: Task) -> set[str]:
    return {name for name in task.inputs if task.slots[name].drop}


def paint_steps(
    bundle: Bundle, task: Task, records: list[Record], candidates: int, options: Drawing, numbers: Sequence[int],
    seeds: Sequence[int] | None = None,
) -> Steps[list[list[Painting]]]:  # fmt: skip
    """Of each record its candidates, the best first. `numbers` of all pictures, and their `seeds` where they differ,
    for their random numbers. A step costs a record what it costs all its candidates."""
    codec, codes, droppable = bundle.codec, _codes(bundle), _droppable(task)

    def in_parts(items: list[T]) -> list[list[T]]:
        return [items[start : start + candidates] for start in range(0, len(items), candidates)]

    prompts = [prompt for r in records for prompt in [bundle.prompt(task, r)] * candidates]
    free = [bundle.prompt(task, {k: v for k, v in r.items() if k not in droppable}) for r in records]
    free = [prompt for prompt in free for _ in range(candidates)]
    kept = kept_codes([r.get(KEPT) for r in records for _ in range(candidates)], codes)
    steps = draw_steps(bundle.model, prompts, free, codes, options, kept, numbers, seeds)
    drawn = yield from recounted(steps, lambda counts: [sum(part) for part in in_parts(counts)])
    yield [0] * len(records)
    rows = zip(drawn.codes.cpu().numpy(), drawn.estimates.tolist(), drawn.score(options).tolist(), strict=True)
    made = [
        Painting(codec.decode(row), place % candidates, row, dict(zip(ESTIMATES, told, strict=True)), score)
        for place, (row, told, score) in enumerate(rows)
    ]
    if candidates > 1 and options.reading:
        yield [0] * len(records)
        made = _read_back(bundle, task, made, [r for r in records for _ in range(candidates)], options.reading)
    return [sorted(part, key=lambda p: -p.score) for part in in_parts(made)]


def _read_back(bundle: Bundle, task: Task, made: list[Painting], asked: list[Record], weight: float) -> list[Painting]:
    """The pictures, where the model has learned the task's reader and there was asked for what it writes with the
    log-probability of writing it from the picture (`reading`) among the estimates and in the score."""
    reader = bundle.tasks.get(task.reader)
    if reader is None:
        return made
    places = [i for i, record in enumerate(asked) if all(record.get(n) is not None for n in reader.outputs)]
    picture = next((name for name in reader.inputs if reader.slots[name].type == "image"), None)
    if picture is None:
        raise UsageError(f"The reader of the task {task.name}, {reader.name}, takes no picture.")
    records = [{picture: made[i].image, **{n: asked[i][n] for n in reader.outputs}} for i in places]
    for i, value in zip(places, (-bundle.target_losses(reader, records)[0]).tolist(), strict=True):
        told = {**made[i].estimates, "reading": value}
        made[i] = replace(made[i], estimates=told, score=made[i].score + weight * value)
    return made


def relevance_by_slot(bundle: Bundle, task: str | Task, drawn: list[Painting], **slots: Any) -> dict[str, list[float]]:
    """How well pictures follow each given slot that may be dropped, by itself: log-odds by slot. Where what was
    asked for contradicts itself it tells which part won."""
    task = drawing_task(bundle, task)
    codes = torch.from_numpy(np.stack([painting.codes for painting in drawn]))
    found, droppable = {}, _droppable(task)
    for name in (name for name in task.inputs if name in droppable):
        if slots.get(name) is None:
            continue
        alone = bundle.prompt(task, {k: v for k, v in slots.items() if k == name or k not in droppable})
        with bundle.precision():
            told = estimate(bundle.model, [alone] * len(codes), codes, _codes(bundle)).estimates
        found[name] = told[:, ESTIMATES.index("relevance")].tolist()
    return found


def drawing_task(bundle: Bundle, task: str | Task) -> Task:
    task = bundle.task(task)
    task.check_draws()
    return task


def _codes(bundle: Bundle) -> Codes:
    codec, tokenizer = bundle.codec, bundle.processor.tokenizer
    return Codes(
        tokenizer.code_start, codec.num_codes, codec.side**2, tokenizer.mask_id, tokenizer.estimate_ids,
        tokenizer.yes_id, tokenizer.no_id,
    )  # fmt: skip


def in_passes(task: Task, decoding: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options, in passes where they do not say otherwise, though the task draws one code after the other."""
    return {"passes": task.decode.get("passes") or Drawing().passes, **(decoding or {})}
