"""Session: a model directory (weights/directory.py) in use."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openm6.core.candidates import Candidate
from openm6.core.errors import UsageError, cut, suggest
from openm6.core.images import check_features
from openm6.core.sequence import Sequence, SketchTarget, TextTarget
from openm6.inference import labels, rank
from openm6.inference.decoding import Generated, check_room
from openm6.inference.modes import mode_of
from openm6.inference.request import BATCH_SIZE, Answer, Prepared, Record, Request
from openm6.inference.steps import finish, in_groups
from openm6.model import M6
from openm6.model.files import save_network
from openm6.model.precision import fast_dtype
from openm6.tasks.constraints import Limits
from openm6.tasks.encode import asked_of, encode_prompt
from openm6.tasks.forms import characters
from openm6.tasks.lengths import check_truncate
from openm6.tasks.library import get as get_task
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.weights.directory import Adapters, describe, open_directory

_log = logging.getLogger(__name__)
_UNTRAINED = "The model was never trained on the task %s: its answers to it mean nothing. It was trained on: %s."

_CUT = (
    "%s is longer than the model takes (%d positions): %d positions at the beginning of its longest text are left out. "
    "Further records of the task %s are truncated without a message."
)


class Session:
    """A network with its tokenizer and tasks: `m6.run("vqa", photo="a.jpg", question="...")`."""

    def __init__(
        self,
        model: M6,
        processor: Processor,
        tasks: Iterable[Task] = (),
        path: Path | None = None,
        adapters: Adapters | None = None,
    ):
        """Raises UsageError where model and processor do not read a source in the same way."""
        if processor.source != model.config.source:
            raise UsageError(
                f"The model has a {model.config.source} source, the processor a {processor.source} one: "
                "weights.directory.make_processor makes a model's processor."
            )
        self.model = model
        self.processor = processor
        self.tasks = {task.name: task for task in tasks}
        self.path = path
        self._adapters, self.active_adapter = adapters, ""
        self._warned: set[tuple[str, ...]] = set()  # shared by all views

    # Files

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        trainable: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Session:
        """Open a model directory, by default on the GPU when there is one. The directory of an adapter is opened with
        its base model.

        `adapters`: directories of adapters of this model by names of the caller's choice; each request takes one or
        none (see `adapter`).

        For inference, weights are bf16 on a GPU and packed for its kernels on a CPU; a `trainable` model
        keeps fp32 weights and computes products under autocast. On the device "meta" it has shapes, and no weights yet.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        opened = open_directory(Path(path), device, trainable, adapters or {})
        return cls(opened.model, opened.processor, opened.tasks, Path(path), opened.adapters)

    def save(self, path: str | Path, max_shard_size: str = "4GB") -> None:
        """Write the model directory (the caller makes it atomic where that matters)."""
        self.describe(Path(path))
        save_network(self.model, Path(path), max_shard_size)

    def describe(self, path: Path, adapter: Any = None) -> None:
        """Write all files of a model directory except the weights (see directory.describe)."""
        describe(path, self.model, self.processor, self.tasks.values(), adapter, self.path)

    # Use

    def adapter(self, name: str | None) -> Session:
        """A view of this model with one of its adapters, or with none (None); it shares the weights and loads nothing:
        `m6.adapter("copy").run("slogan", ...)`. The views of a model cannot be used at the same time."""
        known = self._adapters.tasks if self._adapters else {}
        if name is not None and name not in known:
            there = f"It has: {', '.join(known)}." if known else "It was opened without any (adapters={...})."
            raise UsageError(
                f"The model has no adapter {cut(name)}.{suggest(name, list(known))} {there}", param="adapter"
            )
        tasks = [*self.tasks.values(), *(known[name] if name else [])]
        processor = self.processor
        if self._adapters and name:
            processor = replace(processor, chat=self._adapters.chats[name])
        view = Session(self.model, processor, tasks, self.path, self._adapters)
        view.active_adapter, view._warned = name or "", self._warned
        return view

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that were opened with the model."""
        return list(self._adapters.tasks) if self._adapters else []

    def task(self, name: str | Task) -> Task:
        """A task of this model by name, else one of the library by name or YAML path."""
        task = name if isinstance(name, Task) else self.tasks.get(name) or get_task(name)
        return asked_of(task, self.processor)

    def is_trained_on(self, task: Task) -> bool:
        """Whether one of the model's own tasks has this task's instruction; a model with a chat template was trained to
        follow instructions in text."""
        if self.processor.chat is not None and not (task.draws or task.produces_no_tokens):
            return True
        return any(task.instructions[0] in own.instructions for own in self.tasks.values())

    @property
    def codec(self) -> PictureCodec:
        """The image codec. Raises UsageError for a model that does not draw."""
        return rank.codec_of(self.processor)

    def run(
        self,
        task: str | Task,
        *,
        decoding: Mapping[str, Any] | None = None,
        examples: Items[Record] = (),
        limits: Limits | None = None,
        truncate: str | None = None,
        system: str | None = None,
        thinking: bool | None = None,
        **slots: Any,
    ) -> Any:
        """One answer: `m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")`.

        The value of a task with one output, a dict for a task with several. `decoding` overrides the task's own options
        (see Decoding). `examples`: records with answers, which show what is asked for (data.*.shots in training).
        `limits`: words that the text must not contain, and its length.

        A prompt that exceeds the context raises ContextLengthError. With `truncate="start"` its longest text loses its
        beginning instead, with a warning; other texts, the instruction, tables and pictures lose nothing.

        `system` is a text before all. `thinking`: whether a model whose chat template has a switch for it reasons
        before it answers.
        """
        task = self.task(task)
        task.check(slots)
        request = Request(slots, examples, limits, truncate=truncate, system=system, thinking=thinking)
        return next(self.run_many(task, [request], decoding=decoding))

    def draw(
        self,
        task: str | Task,
        *,
        candidates: int = 1,
        decoding: Mapping[str, Any] | None = None,
        kept: np.ndarray | None = None,
        truncate: str | None = None,
        **slots: Any,
    ) -> list[Candidate]:
        """Candidates for one request, the best first: `m6.draw("text_to_image", candidates=8, caption="红裙子")`.

        Without `decoding["seed"]` a fresh seed is drawn. Each Candidate has a seed of its own, which draws it again
        alone. `kept`, int [side * side]: given codes; -1 is drawn, in passes, so that it attends to all given codes.
        `truncate`: see `run`.
        """
        task = self.task(task)
        task.check_draws()
        task.check(slots)
        request = Request(slots, kept_codes=kept, truncate=truncate)
        return next(self.draw_many(task, [request], candidates=candidates, decoding=decoding))  # type: ignore[no-any-return]

    def run_many(
        self,
        task: str | Task,
        records: Iterable[Record | Request],
        *,
        batch_size: int = BATCH_SIZE,
        decoding: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        truncate: str | None = None,
    ) -> Iterator[Any]:
        """Answers to many records, in their order, read and answered in groups; a Request has options of its own.

        A record's random numbers depend on its index in the call, and not on `batch_size`. A record that cannot be
        used raises its DataError, or with `on_error="return"` has it in its answer's place; a ContextLengthError is one
        (`truncate`: see `run`).
        """
        call = Request({}, decoding=decoding or {}, truncate=truncate)
        yield from self._answers(self.task(task), records, call, batch_size, on_error, single=True)

    def draw_many(
        self, task: str | Task, records: Iterable[Record | Request], *, candidates: int = 1,
        batch_size: int = BATCH_SIZE, decoding: Mapping[str, Any] | None = None, on_error: str = "raise",
        truncate: str | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """For each record a list of `candidates` pictures, the best by the model's own estimates first.

        `decoding` overrides the task's options (see Drawing); without a seed a fresh one is drawn. Each picture has a
        seed of its own: the call's for the first picture, and the numbers that follow it for the others. A warning is
        logged once a task where the best picture is uncertain. `on_error`, `truncate`: see `run_many`.
        """
        task = self.task(task)
        task.check_draws()
        call = Request({}, decoding=decoding or {}, truncate=truncate, candidates=candidates)
        yield from self._answers(task, records, call, batch_size, on_error)

    def vectors(
        self, task: str | Task, records: Iterable[Record | Request], *, batch_size: int = BATCH_SIZE,
        dims: int | None = None, on_error: str = "raise", truncate: str | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """The vector of each record, fp32 [dims] of length 1, by a task that gives one; `dims` cuts it (by default it
        has all dimensions). `on_error`, `truncate`: see `run_many`."""
        task, call = self.task(task), Request({}, decoding={"dims": dims}, truncate=truncate)
        if mode_of(task).result != "vector":
            raise UsageError(f"The task {task.name} gives no vector: it writes {', '.join(task.outputs)}.")
        yield from self._answers(task, records, call, batch_size, on_error)

    def _answers(
        self, task: Task, records: Iterable[Record | Request], call: Request, batch_size: int, on_error: str,
        single: bool = False,
    ) -> Iterator[Any]:  # fmt: skip
        """The values of all records; `single`: as `run` returns them. `call` has the options of all records."""
        mode = mode_of(task, call)
        options = mode.options(self, task, call)

        def prepare(record: Record | Request, number: int) -> Prepared:
            if not isinstance(record, Request):
                return mode.prepare(self, task, replace(call, record=record), number, options)
            request = replace(Request.of(record, call.decoding, call.truncate), candidates=call.candidates)
            return self.prepare(task, request, number)

        def answer(items: list[Prepared]) -> list[Any]:
            values = zip(items, self.answers(task, items, batch_size), strict=True)
            return [item.mode.single(found.value) if single else found.value for item, found in values]

        yield from in_groups(records, mode.group_size(batch_size, call.candidates), prepare, answer, on_error)

    def label_probabilities(
        self, task: str | Task, records: Iterable[Record | Request], *, batch_size: int = BATCH_SIZE,
        on_error: str = "raise", truncate: str | None = None,
    ) -> Iterator[dict[str, float]]:  # fmt: skip
        """The probability of each label, for records of a task whose only output is a label of a closed set, the
        task's or the record's choices: over the label's tokens, among the tokens that continue a label, so that they
        sum to 1. The rest: see `run_many`."""
        task = self.task(task)
        every = labels.LabelTrees(task, self.processor)

        def prepare(record: Record | Request, number: int) -> tuple[Sequence, labels.LabelTree]:
            request = Request.of(record, truncate=truncate)
            tree = every.of(request.record)
            prompt = self.prompt(task, request)
            check_room(self.model, len(prompt), len(tree.levels))
            return prompt, tree

        def answer(items: list[tuple[Sequence, labels.LabelTree]]) -> list[dict[str, float]]:
            prompts, trees = zip(*items, strict=True)
            with self.precision():
                return labels.label_probabilities(self.model, prompts, trees, batch_size)

        yield from in_groups(records, batch_size * 4, prepare, answer, on_error)

    def stream(
        self, task: str | Task, *, decoding: Mapping[str, Any] | None = None, truncate: str | None = None, **slots: Any
    ) -> Iterator[str]:
        """One text answer in pieces, as it is generated. `truncate`: see `run`."""
        task = self.task(task)
        item = self.prepare(task, Request(slots, decoding=decoding or {}, truncate=truncate))
        if item.mode.stream is not None:
            yield from item.mode.stream(self, task, item)
        elif item.mode.result == "text":
            yield str(self.answers(task, [item])[0].value)
        else:
            raise UsageError(f"A {item.mode.result} does not come in pieces: run the task {task.name}.")

    def relevance_by_slot(
        self, task: str | Task, drawn: list[Candidate], *, truncate: str | None = None, **slots: Any
    ) -> dict[str, list[float]]:
        """The relevance of pictures to each given droppable slot alone, as log-odds by slot: see
        `rank.relevance_by_slot`. `truncate`: see `run`."""
        task = self.task(task)
        task.check_draws()
        return rank.relevance_by_slot(self, task, drawn, Request(slots, truncate=truncate))

    def target_losses(
        self, task: str | Task, records: Items[Record], batch_size: int = BATCH_SIZE, truncate: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-probability of the outputs of each record given its inputs, fp64 [N], and their numbers of
        tokens, int64 [N]; of several references the first is measured. `truncate`: see tasks.encode.encode."""
        with self.precision():
            return labels.target_losses(self.model, self.processor, self.task(task), records, batch_size, truncate)

    # Parts of an answer

    def prepare(self, task: Task, request: Record | Request, number: int = 0) -> Prepared:
        """A request as the network takes it, with its options checked and its prompt encoded (see Mode.prepare).
        `number`: index of the request in its call, which selects its random numbers."""
        request = Request.of(request)
        return mode_of(task, request).prepare(self, task, request, number)

    def answers(self, task: Task, items: Items[Prepared], batch_size: int = BATCH_SIZE) -> list[Answer]:
        """Answers to prepared requests of one task, in their order; those with equal batch keys share batches. A
        warning of an answer is logged once a task."""
        alike: dict[Hashable, list[int]] = {}
        for place, item in enumerate(items):
            alike.setdefault(item.batch_key, []).append(place)
        found: dict[int, Answer] = {}
        for places in alike.values():
            mode = items[places[0]].mode
            with self.precision():
                results = finish(mode.steps(self, task, [items[place] for place in places], batch_size))
            found |= {place: mode.read(self, task, result) for place, result in zip(places, results, strict=True)}
        for one in found.values():
            if one.warning and self._is_first("uncertain", task):
                _log.warning(one.warning)
        return [found[place] for place in range(len(items))]

    def prompt(self, task: Task, request: Record | Request) -> Sequence:
        """The Sequence after which the answer begins. A warning is logged once a task where the model was never trained
        on it, and where a record was truncated. Raises ContextLengthError for a prompt that exceeds the context."""
        if self._is_first("task", task) and not self.is_trained_on(task):
            _log.warning(_UNTRAINED, task.name, ", ".join(self.tasks) or "none")
        request = Request.of(request)
        record, truncate = request.record, request.truncate
        check_truncate(truncate)
        prompt = encode_prompt(
            task, record, self.processor, request.examples, truncate, request.system, request.thinking
        )
        if prompt.truncated and self._is_first("cut", task):
            _log.warning(_CUT, record.get("_where", "A record"), self.processor.max_length, prompt.truncated, task.name)
        for picture in prompt.pictures:
            check_features(picture.pixels, self.model.config.hidden_size)
        if request.limits is not None:
            if prompt.constraint is not characters(self.processor.tokenizer) or isinstance(prompt.target, SketchTarget):
                raise UsageError(f"The task {task.name} has a form of its own: it takes no limits beside.")
            prompt.target = TextTarget(request.limits)
        return prompt

    def _is_first(self, what: str, task: Task) -> bool:
        """Whether the warning `what` is due for the task for the first time, with the active adapter."""
        key = (what, self.active_adapter, task.name)
        is_first = key not in self._warned
        self._warned.add(key)
        return is_first

    def generate(
        self,
        task: Task,
        prompts: list[Sequence],
        batch_size: int = BATCH_SIZE,
        decoding: Mapping[str, Any] | None = None,
        numbers: Items[int] | None = None,
    ) -> list[Generated]:
        """Generated texts after prompts of one task, by its own options overridden by `decoding`, in this model's
        precision. `numbers` select the prompts' random numbers (0, 1, ... by default)."""
        request = Request({}, decoding=decoding or {})
        mode = mode_of(task, request)
        options = mode.options(self, task, request)
        numbered = zip(prompts, range(len(prompts)) if numbers is None else numbers, strict=True)
        items = [Prepared(mode, request, prompt, options, number) for prompt, number in numbered]
        with self.precision():
            return finish(mode.steps(self, task, items, batch_size)) if items else []

    def read(self, task: Task, generated: Generated) -> Any:
        """The value of a task's one output, or the dict of its outputs."""
        return task.value(generated.ids, self.processor)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which the network computes: bf16 autocast for fp32 weights on a machine with bf16 units, else
        nothing. It also activates the view's adapter."""
        if self._adapters:
            self._adapters.active.name = self.active_adapter or None
        model = self.model
        kind = model.embed.weight.device.type
        fp32 = model.embed.weight.dtype == torch.float32 and model.packed_head is None
        if fp32 and fast_dtype(kind) == torch.bfloat16:
            return torch.autocast(kind, torch.bfloat16)
        return nullcontext()
