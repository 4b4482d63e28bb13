"""Requests, and the protocol that every kind of answer follows. The table of the kinds is in modes.py."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openm6.core.sequence import Sequence
from openm6.inference.decoding import Decoding, check_room, kv_bytes
from openm6.inference.steps import Steps
from openm6.model import M6
from openm6.tasks.constraints import Limits
from openm6.tasks.processor import Processor
from openm6.tasks.record import Record
from openm6.tasks.task import Task

BATCH_SIZE = 64
"""Default number of rows that the network computes at once."""


@dataclass(frozen=True, slots=True)
class Request:
    """A record, and everything besides the task that its answer depends on.

    record          values by slot name
    examples        records with answers, which stand before the record in the prompt
    limits          words and lengths that constrain the text (tasks/constraints.py)
    kept_codes      int [side * side]: given codes of the picture; -1 where a code is drawn
    truncate        "start": a prompt that exceeds the context loses the beginning of its longest text; None: it is
                    refused
    decoding        decoding options, which override the task's own
    candidates      number of pictures to draw
    probabilities   whether the probability of every label is computed beside the answer
    system          text before all; None: the task's, else that of the model's chat form
    thinking        whether the model reasons before it answers, where its chat template has a switch; None: its default
    """

    record: Record
    examples: Items[Record] = ()
    limits: Limits | None = None
    kept_codes: np.ndarray | None = None
    truncate: str | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    candidates: int = 1
    probabilities: bool = False
    system: str | None = None
    thinking: bool | None = None

    @classmethod
    def of(
        cls, record: Record | Request, decoding: Mapping[str, Any] | None = None, truncate: str | None = None
    ) -> Request:
        """A record as a request. A Request keeps its own options, and takes the given ones where it has none."""
        if not isinstance(record, Request):
            return cls(record, truncate=truncate, decoding=decoding or {})
        return replace(record, truncate=record.truncate or truncate, decoding={**(decoding or {}), **record.decoding})


class Context(Protocol):
    """The parts of a session that the kinds of answers use."""

    model: M6
    processor: Processor
    tasks: dict[str, Task]
    path: Path | None
    active_adapter: str

    def prompt(self, task: Task, request: Record | Request) -> Sequence: ...

    def precision(self) -> AbstractContextManager[Any]: ...


@dataclass(slots=True, eq=False)
class Prepared:
    """A request that the network can work on.

    options     of the kind of answer: Decoding, Drawing, or the number of dimensions of a vector
    number      index of the request in its call, which selects its random numbers
    batch_key   requests of one task with equal keys can share a batch
    kv_bytes    memory of the keys and values, in bytes; 0 for what keeps none or shares the text scheduler's
    """

    mode: Mode
    request: Request
    prompt: Sequence
    options: Any
    number: int
    batch_key: Hashable = None
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A value as a server sends it. `finished`: whether a text ended before max_new_tokens; `warning`: a reason to
    doubt the answer, or ""; `reasoning`: what the model wrote before its answer."""

    value: Any
    finished: bool = True
    warning: str = ""
    reasoning: str = ""


@dataclass(frozen=True)
class Mode:
    """One kind of answer.

    name        of the kind
    result      kind of the value on the wire: "text", "picture", "vector" or "value"
    applies     whether the kind answers this request; the first kind of the table that does is taken
    options     decoding options of a request, checked: the task's own, overridden by the request's
    steps       work on prepared requests with one batch key, with a batch size; one raw result for each request
    read        raw result to answer
    stream      the answer in pieces of text; None: texts come as one piece, other answers cannot be streamed
    check       refuses a request that cannot be answered
    batch_key   key of options and request beside adapter and task
    kv_shape    rows and positions of the key/value cache that a prepared request needs
    single      the value that Session.run returns, of the value on the wire
    group_size  number of records that are read ahead, of batch size and candidates
    available   whether a model with this kind's parts (codec, head) is loaded
    is_exclusive   whether a server works on it in steps of its own, not in the text scheduler's batch
    """

    name: str
    result: str
    applies: Callable[[Task, Request], bool]
    options: Callable[[Context, Task, Request], Any]
    steps: Callable[[Context, Task, list[Prepared], int], Steps[list[Any]]]
    read: Callable[[Context, Task, Any], Answer]
    stream: Callable[[Context, Task, Prepared], Iterator[str]] | None = None
    check: Callable[[Context, Task, Request], None] = lambda context, task, request: None
    batch_key: Callable[[Any, Request], Hashable] = lambda options, request: options
    kv_shape: Callable[[Context, Task, Prepared], tuple[int, int]] = lambda context, task, item: (0, 0)
    single: Callable[[Any], Any] = lambda value: value
    group_size: Callable[[int, int], int] = lambda batch_size, candidates: 4 * batch_size
    available: Callable[[Context, Task], bool] = lambda context, task: True
    is_exclusive: bool = True

    def prepare(self, context: Context, task: Task, request: Request, number: int = 0, options: Any = None) -> Prepared:
        """Check a request and encode its prompt. `options`: what `options` gave for it before.

        Raises UsageError or DataError for a request that cannot be answered.
        """
        options = self.options(context, task, request) if options is None else options
        self.check(context, task, request)
        item = Prepared(self, request, context.prompt(task, request), options, number)
        if isinstance(options, Decoding):
            check_room(context.model, len(item.prompt), options.max_new_tokens)
        item.batch_key = (self.name, self.batch_key(options, request))
        item.kv_bytes = kv_bytes(context.model, *self.kv_shape(context, task, item))
        return item


def text_options(context: Context, task: Task, request: Request) -> Decoding:
    """Decoding options of a task that generates tokens. A model with a chat template samples free texts as its
    checkpoint says; answers of a closed form are the most probable ones."""
    return Decoding.of(**{**usual_decoding(context, task), **request.decoding})


def usual_decoding(context: Context, task: Task) -> dict[str, Any]:
    """A task's decoding options where a request has none."""
    chat = context.processor.chat
    is_free = chat is not None and not {task.slots[name].type for name in task.outputs} <= {"label", "box"}
    return {**(chat.sampling if chat is not None and is_free else {}), **task.decode}
