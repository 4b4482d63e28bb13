"""What is asked of the engine, what it tells of it, and how each kind of task is worked at."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from openm6.core.candidates import Candidate
from openm6.core.errors import UsageError
from openm6.core.sequence import Sequence
from openm6.inference import Decoding
from openm6.inference.beam import beam_steps
from openm6.inference.decoding import check_room
from openm6.inference.draw import Drawing
from openm6.inference.edit import kept_codes_of
from openm6.inference.ends import head_answers, vectors
from openm6.inference.generate import generate
from openm6.inference.labels import LabelTree, label_probabilities
from openm6.inference.pieces import cut_at_stop
from openm6.inference.rank import KEPT, check_wish, in_passes, options_of, paint_steps
from openm6.inference.refine import refine_steps
from openm6.inference.session import SHOTS, TRUNCATE, Session, check_dims
from openm6.inference.steps import Steps
from openm6.model.precision import fast_dtype
from openm6.serve.slots import bytes_of_slot
from openm6.tasks.task import Task

BATCH = 64
"""Rows of labels that are read at once."""
LATE = "The request's deadline has passed."


@dataclass(slots=True, eq=False)
class Request:
    """One wish: a task of the model or of the library, a record with its slots, and how to decode.

    candidates   pictures of a task that draws
    examples     records with answers, told before
    edit         pixels and open_blocks of a square, of a task that draws: what is redrawn (editing.Cut)
    deadline     by time.monotonic(): after it the request fails
    pieces       whether a text is told in pieces too, as it is written
    truncate     "start" where the longest text loses its beginning, if the prompt is longer than the model takes
    probabilities   of a task whose output is a label: the value is {"value": label, "probabilities": {label: number}}
    stop         strings at the first of which a text ends, without it; of a task that writes texts alone
    """

    id: str
    task: str
    record: Mapping[str, Any]
    decoding: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    candidates: int = 1
    examples: list[Mapping[str, Any]] = field(default_factory=list)
    edit: Mapping[str, Any] | None = None
    deadline: float | None = None
    pieces: bool = True
    probabilities: bool = False
    stop: Items[str] = ()
    truncate: str | None = None

    # The cost so far, of which every event tells: tokens that were computed for the answer, and positions of the prompt
    # once it is read.
    tokens: int = 0
    prompt_tokens: int = 0

    # What `prepared` makes of it; `needs`: bytes of keys and values, of what is no plain text; `finished`: see Told.
    made: Task | None = None
    prompt: Sequence | None = None
    options: Any = None
    alone: bool = False
    like: Hashable = None
    needs: int = 0
    finished: bool = True

    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and self.deadline < time.monotonic()


@dataclass(slots=True)
class Told:
    """What became of a request so far: a piece of its text, its answer, or why it has none.

    `finished`: whether the text came to its end, or to a stop string, before max_new_tokens; `tokens` and
    `prompt_tokens`: the request's cost so far, also of an error, and of a request that was cancelled; `truncated`:
    positions of the prompt that were left out.
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


def prepared(request: Request, view: Session) -> None:
    """Fill in what the engine works with. Raises UsageError or DataError for what cannot be done."""
    task = request.made = view.task(request.task)
    task.check(request.record)
    record = {**request.record, SHOTS: request.examples, TRUNCATE: request.truncate}
    request.record = record
    request.alone = True
    request.stop = tuple(stop for stop in request.stop if stop)
    if request.stop and any(task.slots[name].type != "text" for name in task.outputs):
        raise UsageError(f"The task {task.name} does not write texts alone: it takes no stop strings.", param="stop")
    kind: tuple[Hashable, ...]
    if request.probabilities:
        tree, request.options = LabelTree(task, view.processor), Decoding.of(**{**task.decode, **request.decoding})
        request.prompt = view.prompt(task, record, request.decoding)
        positions = len(request.prompt) + max(request.options.max_new_tokens, len(tree.levels))
        check_room(view.model, positions, 0)
        kind, request.needs = ("probabilities", request.options), _bytes(view, tree.cached(BATCH), positions)
    elif task.draws:
        decoding = in_passes(task, request.decoding) if request.edit else request.decoding
        _, request.options = options_of(view, task, request.candidates, decoding)
        if request.edit:
            record[KEPT] = kept_codes_of(view.codec, request.edit["pixels"], request.edit["open_blocks"])
        check_wish(task, record)
        kind = ("draw", replace(request.options, seed=0), request.candidates)
        request.prompt = view.prompt(task, record)  # a bad record is told now, and not in the midst of others
        pictures = request.candidates * request.options.branches * (2 if request.options.guidance else 1)
        request.needs = _bytes(view, pictures, len(request.prompt) + view.codec.side**2)
    elif task.embeds:
        request.options = check_dims(view.model, request.decoding.get("dims"))
        kind = ("vector", request.options)
        request.prompt = view.prompt(task, record)
    elif task.head:
        kind = ("head",)
        request.prompt = view.prompt(task, record)
    else:
        request.options = Decoding.of(**{**task.decode, **request.decoding})
        request.prompt = view.prompt(task, record, request.decoding)
        written = len(request.prompt) + request.options.max_new_tokens
        if task.sketch:
            request.needs = _bytes(view, 1, written)
            kind = ("sketch", request.options.max_new_tokens)
        elif request.options.num_beams > 1:
            request.needs = _bytes(view, request.options.num_beams, written)
            kind = ("beam", request.options)
        else:
            kind, request.alone = ("text",), False
    request.like = (request.adapter, task.name, *kind)


def _bytes(view: Session, rows: int, positions: int) -> int:
    device = view.model.embed.weight.device
    return rows * bytes_of_slot(view.model.config, positions, fast_dtype(device.type), device)


def steps_of(view: Session, requests: list[Request]) -> Steps[list[Any]]:
    """Alike requests that are no plain texts, at once; a value for each, and the cost of each step for each."""
    first = requests[0]
    task, options = first.made, first.options
    prompts = [request.prompt for request in requests if request.prompt is not None]
    assert task is not None
    pad_id = view.processor.tokenizer.pad_id
    if first.probabilities:
        return _with_probabilities(view, task, requests, prompts)
    if task.draws:
        return _pictures(view, task, requests, options)
    if task.embeds:
        return _at_once(lambda: list(vectors(view.model, prompts, pad_id, options)), len(requests))
    if task.head:
        return _at_once(lambda: head_answers(view.model, prompts, pad_id, task.head), len(requests))
    return _texts(view, task, requests, prompts)


def _pictures(view: Session, task: Task, requests: list[Request], options: Drawing) -> Steps[list[list[Candidate]]]:
    records, seeds = [request.record for request in requests], [request.options.seed for request in requests]
    return (yield from paint_steps(view, task, records, requests[0].candidates, options, seeds))


def _with_probabilities(
    view: Session, task: Task, requests: list[Request], prompts: list[Sequence]
) -> Steps[list[Any]]:
    """The answers, then the probabilities, which cost the beginnings of labels that are read."""
    tokenizer, options = view.processor.tokenizer, requests[0].options
    if options.num_beams > 1:
        answers = yield from _texts(view, task, requests, prompts)
    else:
        # Each request draws as if it were alone.
        written = generate(view.model, prompts, tokenizer.end_id, options, numbers=[0] * len(prompts))
        yield [len(one.ids) + one.finished for one in written]
        answers = [view.read(task, one) for one in written]
    tree = LabelTree(task, view.processor)
    found = label_probabilities(view.model, prompts, tree, BATCH)
    yield [sum(map(len, tree.levels[1:]))] * len(prompts)
    return [{"value": one, "probabilities": told} for one, told in zip(answers, found, strict=True)]


def _at_once(act: Any, rows: int) -> Steps[list[Any]]:
    """Work that writes nothing: its prompts are all that it costs."""
    yield [0] * rows
    return act()  # type: ignore[no-any-return]


def _texts(view: Session, task: Task, requests: list[Request], prompts: list[Sequence]) -> Steps[list[Any]]:
    tokenizer, options = view.processor.tokenizer, requests[0].options
    if task.sketch:
        found = yield from refine_steps(view.model, prompts, tokenizer, options.max_new_tokens)
    else:
        found = yield from beam_steps(view.model, prompts, tokenizer.end_id, options)
    answers = []
    for one, asked in zip(found, requests, strict=True):
        whole = view.read(task, one)
        answers.append(cut_value(whole, asked.stop))
        asked.finished = one.finished or answers[-1] != whole
    return answers


def cut_value(value: Any, stops: Items[str]) -> Any:
    """A text, or each of several by name, up to its first stop string."""
    if not stops:
        return value
    if isinstance(value, Mapping):
        return {name: cut_at_stop(text, stops) for name, text in value.items()}
    return cut_at_stop(value, stops)
