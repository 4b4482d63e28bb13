"""Requests of the engine, the events that it emits about them, and their work in steps."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence as Items
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.inference.edit import kept_codes_of
from openm6.inference.pieces import cut_at_stop
from openm6.inference.request import BATCH_SIZE, Answer, Prepared, Request
from openm6.inference.session import Session
from openm6.inference.steps import Steps
from openm6.tasks.task import Task


def cancelled() -> Refusal:
    return Refusal(ErrorKind.CANCELLED, "The request was cancelled.")


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request with everything that its scheduling needs.

    task_name     of a task of the model or of the library
    adapter       name of the adapter that answers it; None: the base model
    edit_region   "pixels" and "open_blocks" of the square that is redrawn (inference.edit.Cut); None: no edit
    deadline      by time.monotonic(): the request fails after it; inf: none
    pieces        whether a text is emitted in pieces while it is generated
    stop          strings; a text ends before the first of them. Only for tasks whose outputs are all texts
    tokens, prompt_tokens   cost so far: tokens that were computed for the answer, and positions of the prompt once the
                  network has read it
    task, prepared   set by `prepare`
    batch_key     exclusive requests with equal keys can share a batch
    """

    id: str
    task_name: str
    request: Request
    adapter: str | None = None
    edit_region: Mapping[str, Any] | None = None
    deadline: float = inf
    pieces: bool = True
    stop: Items[str] = ()
    tokens: int = 0
    prompt_tokens: int = 0
    task: Task = field(init=False)
    prepared: Prepared = field(init=False)
    batch_key: Hashable = None

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> EngineRequest:
        """The request of a message to a worker: "id", "task", "record" and the optional fields of Request and
        EngineRequest, "edit" for `edit_region` and "seconds" until the deadline."""
        rest = dict(message)
        names = ("record", "examples", "truncate", "decoding", "candidates", "probabilities", "system", "thinking")
        request = Request(**{name: rest.pop(name) for name in names if name in rest})
        task_name, edit_region = rest.pop("task"), rest.pop("edit", None)
        deadline = time.monotonic() + rest.pop("seconds", inf)
        return cls(request=request, task_name=task_name, edit_region=edit_region, deadline=deadline, **rest)

    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline < time.monotonic()


@dataclass(slots=True)
class RequestEvent:
    """An event of a request: a piece of its text, its answer, or its error. `done`: it is the request's last event.

    finished               whether the text ended, or reached a stop string, before max_new_tokens
    tokens, prompt_tokens  the request's cost so far, also with an error or a cancellation
    truncated              number of positions of the prompt that were left out
    reasoning              what the model wrote before its answer: a piece of it, with the answer all of it
    """

    id: str
    piece: str = ""
    value: Any = None
    done: bool = False
    error: Exception | None = None
    finished: bool = True
    tokens: int = 0
    prompt_tokens: int = 0
    truncated: int = 0
    reasoning: str = ""


def prepare(request: EngineRequest, view: Session) -> None:
    """Check the request and encode its prompt. Raises UsageError or DataError for one that cannot be answered."""
    task = request.task = view.task(request.task_name)
    task.check(request.request.record)
    request.stop = tuple(stop for stop in request.stop if stop)
    if request.stop and any(task.slots[name].type != "text" for name in task.outputs):
        raise UsageError(f"The task {task.name} does not write texts alone: it takes no stop strings.", param="stop")
    if request.edit_region:
        codes = kept_codes_of(view.codec, request.edit_region["pixels"], request.edit_region["open_blocks"])
        request.request = replace(request.request, kept_codes=codes)
    request.prepared = view.prepare(task, request.request)
    request.batch_key = (request.adapter, task.name, request.prepared.batch_key)


def steps_of(view: Session, requests: list[EngineRequest]) -> Steps[list[Answer]]:
    """The answers to requests that share a batch key, and the cost of each step for each of them."""
    items = [request.prepared for request in requests]
    results = yield from items[0].mode.steps(view, requests[0].task, items, BATCH_SIZE)
    return [read(view, request, result) for request, result in zip(requests, results, strict=True)]


def read(view: Session, request: EngineRequest, result: Any) -> Answer:
    """The answer of a raw result (see Mode), cut at the first stop string; a text that was cut has finished."""
    answer = request.prepared.mode.read(view, request.task, result)
    if not request.stop:
        return answer
    value = answer.value
    if isinstance(value, Mapping):
        value = {name: cut_at_stop(text, request.stop) for name, text in value.items()}
    else:
        value = cut_at_stop(value, request.stop)
    return replace(answer, value=value, finished=answer.finished or value != answer.value)
