"""Pictures that the network draws: candidates, ranked by its own estimates and by reading them back."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence as Items
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from openm6._version import __version__
from openm6.core.bases import directory_hash
from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, UsageError
from openm6.core.files import dumps, plain
from openm6.core.images import ORIGIN, UNCERTAIN, Features, as_file
from openm6.inference.draw import OPEN, Codes, Drawing, draw_steps, estimate, kept_codes
from openm6.inference.labels import target_losses
from openm6.inference.request import Answer, Context, Mode, Prepared, Request
from openm6.inference.steps import Steps, map_costs
from openm6.tasks.drawn import ESTIMATES
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.record import where
from openm6.tasks.task import Task

T = TypeVar("T")

UNREAD = -1.0
"""Mean log-probability of a token of the request's text, read from a candidate, below which it is uncertain.

Chosen on validation data of the demo's model, with studio pictures in the place of drawn ones: 60 captions of the
picture had -0.73 or more; 26 other requests (English, other subjects, no words, contradictions), read from the best of
eight pictures, -2.7 or less. Of as many held-out ones: -0.50 or more, and -1.5 or less (an area under the ROC curve of
1.00); no caption of 60 is uncertain, all 26 others are, and 19 of 24 captions that are wrong in one attribute."""

SEEDS = 2**63
"""Exclusive upper bound of picture seeds, as the API takes them."""


def fresh_seed() -> int:
    """A random seed for a request that has none, below 2**31."""
    return secrets.randbelow(2**31)


def codec_of(processor: Processor) -> PictureCodec:
    """The image codec. Raises UsageError for a model that does not draw."""
    if processor.codec is None:
        raise UsageError("This model does not draw: it has no image codec (model.codec in its recipe).")
    return processor.codec


def _codes(processor: Processor) -> Codes:
    codec, tokenizer = codec_of(processor), processor.tokenizer
    return Codes(
        tokenizer.code_start, codec.num_codes, codec.side**2, tokenizer.mask_id, tokenizer.estimate_ids,
        tokenizer.yes_id, tokenizer.no_id,
    )  # fmt: skip


def _droppable(task: Task) -> set[str]:
    return {name for name in task.inputs if task.slots[name].drop}


def _options(context: Context, task: Task, request: Request) -> Drawing:
    """Options of a request, by a fresh seed where none is given. Given codes and branches need passes: with them a task
    that draws one code after the other is drawn in passes, unless the request says otherwise."""
    decoding = dict(request.decoding)
    if request.kept_codes is not None or decoding.get("branches", 1) != 1:
        decoding = {"passes": task.decode.get("passes") or Drawing().passes, **decoding}
    options = Drawing.of(**{"seed": fresh_seed(), **task.decode, **decoding})
    if options.guidance and not _droppable(task):
        raise UsageError(f"The task {task.name} has no slot that can be dropped: guidance has nothing to leave.")
    if request.candidates < 1:
        raise UsageError(f"candidates is {request.candidates}; draw 1 or more.")
    return options


def _check(context: Context, task: Task, request: Request) -> None:
    """Raises DataError for a request for nothing: a blank text, or neither a slot nor kept codes."""
    record = request.record
    for name in task.inputs:
        value = record.get(name)
        if task.slots[name].type == "text" and isinstance(value, str) and value and not value.strip():
            raise DataError(f"{where(record)}{name}: holds blanks alone.", param=name)
    if request.kept_codes is None and not task.asked(record):
        raise DataError(f"{where(record)}nothing is asked for: give {' or '.join(task.inputs)}.")
    kept_codes([request.kept_codes], _codes(context.processor))


def _kv_shape(context: Context, task: Task, item: Prepared) -> tuple[int, int]:
    pictures = item.request.candidates * item.options.branches * (2 if item.options.guidance else 1)
    return pictures, len(item.prompt) + codec_of(context.processor).side ** 2


def _steps(context: Context, task: Task, items: list[Prepared], batch_size: int) -> Steps[list[list[Candidate]]]:
    """The candidates of each request, the best first. Their seeds count up from the request's; request `number` of a
    call begins `number` times the candidates later. A step costs a request the costs of all its candidates."""
    options, count = items[0].options, items[0].request.candidates
    codec, codes, droppable = codec_of(context.processor), _codes(context.processor), _droppable(task)

    def by_request(rows: list[T]) -> list[list[T]]:
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    def by_row(values: Items[T]) -> list[T]:
        return [value for value in values for _ in range(count)]

    requests, free = by_row([item.request for item in items]), []
    if options.guidance:
        for item in items:
            record = {name: value for name, value in item.request.record.items() if name not in droppable}
            free.append(context.prompt(task, replace(item.request, record=record)))
    kept = kept_codes([request.kept_codes for request in requests], codes)
    firsts = [item.options.seed + item.number * count for item in items]
    seeds = [(first + number) % SEEDS for first in firsts for number in range(count)]
    prompts = by_row([item.prompt for item in items])
    steps = draw_steps(context.model, prompts, by_row(free), codes, options, kept, seeds)
    drawn = yield from map_costs(steps, lambda costs: [sum(some) for some in by_request(costs)])
    yield [0] * len(items)
    rows = zip(drawn.codes.cpu().numpy(), drawn.estimates.tolist(), drawn.score(options).tolist(), strict=True)
    candidates = [
        Candidate(codec.decode(row), place % count, row, dict(zip(ESTIMATES, estimates, strict=True)), score, seed)
        for place, ((row, estimates, score), seed) in enumerate(zip(rows, seeds, strict=True))
    ]
    for item, some in zip(items, by_request(candidates), strict=True):
        origin = _origin(context, task, item.request)
        for one in some:
            own_options = {**asdict(options), "seed": one.seed}
            one.image.info[ORIGIN] = dumps({**origin, "number": one.number, "options": own_options}, plain)
    if options.reading:
        yield [0] * len(items)
        candidates = _read_back(context, task, candidates, requests, options.reading)
    return [sorted(some, key=lambda one: -one.score) for some in by_request(candidates)]


def _origin(context: Context, task: Task, request: Request) -> dict[str, Any]:
    """What draws the request's pictures again, without any path: a given picture is named by the SHA-256 of its file;
    `kept` is the number of given codes."""
    slots = task.asked(request.record)
    for name in (name for name in slots if task.slots[name].type == "image"):
        features = Features.of(slots[name])
        content = as_file(slots[name]) if features is None else features.data
        slots[name] = {"sha256": hashlib.sha256(content).hexdigest()}
    kept = request.kept_codes
    origin = {
        "openm6": __version__, "model": _model_hash(context.path), "adapter": context.active_adapter,
        "task": task.name, "slots": slots, "truncate": request.truncate,
        "kept": 0 if kept is None else int((np.asarray(kept) != OPEN).sum()),
    }  # fmt: skip
    return {name: value for name, value in origin.items() if value not in ("", None)}


def _model_hash(path: Path | None) -> str:
    if path is None:
        return ""
    state = path.stat()
    return _hash_once(path, state.st_ino, state.st_mtime_ns)


@lru_cache
def _hash_once(path: Path, *state: int) -> str:
    """The hash of a directory in this state: it takes a second for some billions of weights."""
    return directory_hash(path)


def _read_back(
    context: Context, task: Task, candidates: list[Candidate], requests: list[Request], weight: float
) -> list[Candidate]:
    """The candidates with the log-probability of generating the request's text from the picture (`reading`) among the
    estimates and in the score, where the model was trained on the task's reader and the request has that text."""
    reader = context.tasks.get(task.reader)
    if reader is None:
        return candidates
    places = [i for i, one in enumerate(requests) if all(one.record.get(n) is not None for n in reader.outputs)]
    picture = next((name for name in reader.inputs if reader.slots[name].type == "image"), None)
    if picture is None:
        raise UsageError(f"The reader of the task {task.name}, {reader.name}, takes no picture.")
    records = [{picture: candidates[i].image, **{n: requests[i].record[n] for n in reader.outputs}} for i in places]
    losses, counts = target_losses(context.model, context.processor, reader, records)
    for i, value, each in zip(places, (-losses).tolist(), (-losses / counts).tolist(), strict=True):
        estimates = {**candidates[i].estimates, "reading": value}
        score = candidates[i].score + weight * value
        candidates[i] = replace(candidates[i], estimates=estimates, score=score, uncertain=each < UNREAD)
    return candidates


def relevance_by_slot(
    context: Context, task: Task, candidates: list[Candidate], request: Request
) -> dict[str, list[float]]:
    """The relevance of every candidate to each given droppable slot alone: log-odds by slot. Where slots contradict
    each other, it shows which one the pictures follow."""
    codes = torch.from_numpy(np.stack([candidate.codes for candidate in candidates]))
    found, droppable, record = {}, _droppable(task), request.record
    for name in (name for name in task.inputs if name in droppable and record.get(name) is not None):
        alone = {k: v for k, v in record.items() if k == name or k not in droppable}
        prompt = context.prompt(task, replace(request, record=alone))
        with context.precision():
            drawn = estimate(context.model, [prompt] * len(codes), codes, _codes(context.processor))
        found[name] = drawn.estimates[:, ESTIMATES.index("relevance")].tolist()
    return found


PICTURE = Mode(
    "picture", "picture", applies=lambda task, request: task.draws, options=_options, steps=_steps, check=_check,
    read=lambda context, task, candidates: Answer(candidates, warning=UNCERTAIN if candidates[0].uncertain else ""),
    batch_key=lambda options, request: (replace(options, seed=0), request.candidates), kv_shape=_kv_shape,
    single=lambda candidates: candidates[0].image,
    group_size=lambda batch_size, candidates: max(1, batch_size // candidates),
    available=lambda context, task: context.processor.codec is not None,
)  # fmt: skip
