"""Session: a model directory (directory.py) and what one does with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openm6.core.batch import pad
from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.images import UNCERTAIN, check_features
from openm6.core.sequence import Sequence, SketchTarget, TextTarget
from openm6.inference import Decoding, Generated, generate, stream
from openm6.inference.decoding import check_room
from openm6.inference.ends import head_answers, vectors
from openm6.inference.labels import LabelTree, label_probabilities
from openm6.inference.many import answer_groups
from openm6.inference.pieces import Pieces
from openm6.inference.rank import KEPT, TRUNCATE, draw_many, drawing_task, in_passes, relevance_by_slot
from openm6.inference.refine import refine
from openm6.inference.steps import each_inside
from openm6.model import M6
from openm6.model.files import save_network
from openm6.model.precision import fast_dtype
from openm6.tasks.constraints import Limits
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.forms import characters
from openm6.tasks.lengths import check_truncate
from openm6.tasks.library import get as get_task
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.weights.directory import Adapters, describe, open_directory

Record = Mapping[str, Any]

_log = logging.getLogger(__name__)
_UNTRAINED = "The model was never trained on the task %s: its answers to it mean nothing. It was trained on: %s."

_CUT = (
    "%s is longer than the model takes (%d positions): %d positions at the beginning of its longest text are left out. "
    "Further records of the task %s are truncated without a message."
)

SHOTS = "_shots"
"""In a record: other records with their answers, examples of what is asked for."""

LIMITS = "_limits"
"""In a record: what its answer must not say, a Limits (tasks/constraints.py)."""


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
        self.model = model
        self.processor = processor
        self.tasks = {task.name: task for task in tasks}
        self.path = path
        self._adapters, self.active_adapter = adapters, ""
        self._checked: set[tuple[str, ...]] = set()  # what was warned of, shared by all views

    # Files

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        trainable: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Session:
        """Open a model directory, on the GPU when there is one. An adapter's comes with the model beneath it.

        `adapters`, by names of your own: directories of adapters of this model, of which each request takes one or none
        (see `adapter`).

        For answering, weights are bf16 on a GPU and laid out for its kernels on a CPU; a `trainable` model
        keeps fp32 weights and runs its products under autocast. On the device "meta" it has shapes, and no weights yet.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        opened = open_directory(Path(path), device, trainable, adapters or {})
        return cls(opened.model, opened.processor, opened.tasks, Path(path), opened.adapters)

    def save(self, path: str | Path, max_shard_size: str = "4GB") -> None:
        """Write the model directory (the caller makes it atomic where that matters)."""
        self.describe(Path(path))
        save_network(self.model, Path(path), max_shard_size)

    def describe(self, path: Path, adapter: Any = None) -> None:
        """Write all of a model directory but the weights (see directory.describe)."""
        describe(path, self.model, self.processor, self.tasks.values(), adapter)

    # Use

    def adapter(self, name: str | None) -> Session:
        """This model as one of its adapters changes it, or without any (None); the weights are shared, and nothing is
        loaded: `m6.adapter("copy").run("slogan", ...)`. Of all views of a model one at a time may work."""
        known = self._adapters.tasks if self._adapters else {}
        if name is not None and name not in known:
            there = f"It has: {', '.join(known)}." if known else "It was opened without any (adapters={...})."
            raise UsageError(
                f"The model has no adapter {cut(name)}.{suggest(name, list(known))} {there}", param="adapter"
            )
        tasks = [*self.tasks.values(), *(known[name] if name else [])]
        view = Session(self.model, self.processor, tasks, self.path, self._adapters)
        view.active_adapter, view._checked = name or "", self._checked
        return view

    @property
    def adapters(self) -> list[str]:
        """Names of those that were opened with the model."""
        return list(self._adapters.tasks) if self._adapters else []

    def task(self, name: str | Task) -> Task:
        """A task of this model by name, else one of the library by name or YAML path."""
        if isinstance(name, Task):
            return name
        return self.tasks.get(name) or get_task(name)

    def is_trained_on(self, task: Task) -> bool:
        """Whether one of the model's own tasks has this task's instruction."""
        return any(task.instructions[0] in own.instructions for own in self.tasks.values())

    def run(
        self,
        task: str | Task,
        *,
        decoding: Mapping[str, Any] | None = None,
        examples: Items[Record] = (),
        limits: Limits | None = None,
        truncate: str | None = None,
        **slots: Any,
    ) -> Any:
        """One answer. `m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")`.

        A task with one output gives its value, a task with several a dict. `decoding` overrides the task's own options
        (see Decoding). `examples`: records with answers, to be told what is asked for (data.*.shots in training).
        `limits`: what the text must not say, and how long it may be.

        A prompt that is longer than the model takes raises ContextLengthError. With `truncate="start"` its longest text
        loses its beginning instead, with a warning; other texts, the instruction, tables and pictures lose nothing.
        """
        task = self.task(task)
        task.check(slots)
        record = {**slots, SHOTS: examples, LIMITS: limits}
        return next(iter(self.run_many(task, [record], decoding=decoding, truncate=truncate)))

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
        """Candidates for one wish, the best first: `m6.draw("text_to_image", candidates=8, caption="红裙子")`.

        Without `decoding["seed"]` a fresh seed is drawn; each Candidate has its own, which draws it again alone.
        `kept`, int [side * side]: codes that are given; -1 is drawn, in passes, so that it sees what is kept behind it.
        `truncate`: see `run`.
        """
        task = drawing_task(self, task)
        task.check(slots)
        if kept is not None:
            decoding = in_passes(task, decoding)
        records = [{**slots, KEPT: kept, TRUNCATE: truncate}]
        return next(self.draw_many(task, records, candidates=candidates, decoding=decoding))  # type: ignore[no-any-return]

    def run_many(
        self,
        task: str | Task,
        records: Iterable[Record],
        *,
        batch_size: int = 64,
        decoding: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        truncate: str | None = None,
    ) -> Iterator[Any]:
        """Answers to many records, in their order; read and answered `batch_size` x 4 at a time.

        A record's random numbers are those of its number in the call, whatever `batch_size` is. A record that cannot be
        used raises its DataError, or with `on_error="return"` has it in its answer's place; a ContextLengthError is one
        (`truncate`: see `run`).
        """
        task, records = self.task(task), _truncating(records, truncate)
        if task.draws:
            drawn = self.draw_many(task, records, batch_size=batch_size, decoding=decoding, on_error=on_error)
            yield from (best if isinstance(best, DataError) else best[0].image for best in drawn)
            return
        if task.embeds:
            dims = (decoding or {}).get("dims")
            yield from self.vectors(task, records, batch_size=batch_size, dims=dims, on_error=on_error)
            return

        def answer(prompts: list[Sequence], numbers: list[int]) -> list[Any]:
            if task.head:
                with self.precision():
                    return head_answers(self.model, prompts, self.processor.tokenizer.pad_id, task.head, batch_size)
            return [self.read(task, one) for one in self.generate(task, prompts, batch_size, decoding, numbers)]

        prepare = partial(self.prompt, task, decoding=decoding)
        yield from answer_groups(records, batch_size * 4, prepare, answer, on_error)

    def label_probabilities(
        self, task: str | Task, records: Iterable[Record], *, batch_size: int = 64, on_error: str = "raise",
        truncate: str | None = None,
    ) -> Iterator[dict[str, float]]:  # fmt: skip
        """The probability of each label, for records of a task whose one output is a label of a closed set: over the
        label's tokens, among those that the labels allow, so that they sum to 1. The rest: see `run_many`."""
        task = self.task(task)
        tree = LabelTree(task, self.processor)

        def answer(prompts: list[Sequence], numbers: list[int]) -> list[dict[str, float]]:
            with self.precision():
                return label_probabilities(self.model, prompts, tree, batch_size)

        prepare = partial(self.prompt, task, decoding={"max_new_tokens": len(tree.levels)})
        yield from answer_groups(_truncating(records, truncate), batch_size * 4, prepare, answer, on_error)

    def vectors(
        self, task: str | Task, records: Iterable[Record], *, batch_size: int = 64, dims: int | None = None,
        on_error: str = "raise", truncate: str | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """The vector of each record, fp32 [dims] of length 1, by a task that gives one; `dims` cuts it (all numbers by
        default). `on_error`, `truncate`: see `run_many`."""
        task = self.task(task)
        if not task.embeds:
            raise UsageError(f"The task {task.name} gives no vector: it writes {', '.join(task.outputs)}.")
        dims = check_dims(self.model, dims)

        def answer(prompts: list[Sequence], numbers: list[int]) -> np.ndarray:
            with self.precision():
                return vectors(self.model, prompts, self.processor.tokenizer.pad_id, dims, batch_size)

        records = _truncating(records, truncate)
        yield from answer_groups(records, batch_size * 4, partial(self.prompt, task), answer, on_error)

    def stream(
        self, task: str | Task, *, decoding: Mapping[str, Any] | None = None, truncate: str | None = None, **slots: Any
    ) -> Iterator[str]:
        """One text answer in pieces, as it is written. `truncate`: see `run`."""
        task, record = self.task(task), {**slots, TRUNCATE: truncate}
        if task.draws:
            raise UsageError(f"The task {task.name} draws a picture, which does not come in pieces: run it.")
        if task.sketch:  # all of it is decided at once
            yield str(next(iter(self.run_many(task, [record], decoding=decoding))))
            return
        if task.silent:
            raise UsageError(f"The task {task.name} gives numbers, which do not come in pieces: run it.")
        options = Decoding.of(**{**task.decode, **(decoding or {})})
        pieces = Pieces(self.processor.tokenizer)
        tokens = stream(self.model, self.prompt(task, record, decoding), self.processor.tokenizer.end_id, options)
        for token in each_inside(self.precision, tokens):
            if piece := pieces.add(token):
                yield piece
        if piece := pieces.rest():
            yield piece

    def draw_many(
        self, task: str | Task, records: Iterable[Record], *, candidates: int = 1, batch_size: int = 64,
        decoding: Mapping[str, Any] | None = None, on_error: str = "raise", truncate: str | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """For each record `candidates` pictures, the best first: see `rank.draw_many`. `truncate`: see `run`. Of
        each task one warning is logged where the best picture is uncertain."""
        task, records = self.task(task), _truncating(records, truncate)
        options: dict[str, Any] = {"candidates": candidates, "batch_size": batch_size, "on_error": on_error}
        for drawn in draw_many(self, task, records, decoding=decoding, **options):
            if not isinstance(drawn, DataError) and drawn[0].uncertain and self._is_first("uncertain", task):
                _log.warning(UNCERTAIN)
            yield drawn

    def relevance_by_slot(self, task: str | Task, drawn: list[Candidate], **slots: Any) -> dict[str, list[float]]:
        """How well pictures follow each given slot by itself: see `rank.relevance_by_slot`."""
        return relevance_by_slot(self, task, drawn, **slots)

    @torch.inference_mode()
    def target_losses(
        self, task: str | Task, records: Items[Record], batch_size: int = 64, truncate: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-probability of the outputs that records have, given their inputs, fp64 [N], and of how many
        tokens, int64 [N]; of several references the first one's. `truncate`: see tasks.encode.encode."""
        task, pad_id = self.task(task), self.processor.tokenizer.pad_id
        sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
        for start in range(0, len(records), batch_size):
            some = records[start : start + batch_size]
            batch = pad(
                [encode_example(task, record, self.processor, truncate=truncate or "end") for record in some], pad_id
            )
            with self.precision():
                out = self.model(batch.to(self.model.embed.weight.device))
            total, trained = out.by_example(len(some))
            sums.append(total.cpu())
            counts.append(trained.cpu())
        return torch.cat(sums), torch.cat(counts)

    @property
    def codec(self) -> PictureCodec:
        """Of a model that draws; of another a UsageError."""
        if self.processor.codec is None:
            raise UsageError("This model does not draw: it has no image codec (model.codec in its recipe).")
        return self.processor.codec

    def prompt(self, task: Task, record: Record, decoding: Mapping[str, Any] | None = None) -> Sequence:
        """The Sequence from which a record is answered. Of each task one warning is logged where the model was never
        trained on it, and one where a record was truncated. Raises ContextLengthError for what the model has no
        positions for, the answer's (by `decoding`, or the task's own options) included where positions are learned.
        """
        if self._is_first("task", task) and not self.is_trained_on(task):
            _log.warning(_UNTRAINED, task.name, ", ".join(self.tasks) or "none")
        shots, truncate = record.get(SHOTS, ()), record.get(TRUNCATE)
        check_truncate(truncate)
        prompt = encode_prompt(task, record, self.processor, shots=shots, truncate=truncate)
        if self.model.place is not None and not (task.draws or task.silent):
            options = Decoding.of(**{**task.decode, **(decoding or {})})
            check_room(self.model, len(prompt), options.max_new_tokens)
        if prompt.cut and self._is_first("cut", task):
            _log.warning(_CUT, record.get("_where", "A record"), self.processor.max_length, prompt.cut, task.name)
        for picture in prompt.pictures:
            check_features(picture.pixels, self.model.config.hidden_size)
        if record.get(LIMITS) is not None:
            if prompt.constraint is not characters(self.processor.tokenizer) or isinstance(prompt.target, SketchTarget):
                raise UsageError(f"The task {task.name} has a form of its own: it takes no limits beside.")
            prompt.target = TextTarget(record[LIMITS])
        return prompt

    def _is_first(self, what: str, task: Task) -> bool:
        """Whether the warning `what` is due for the task for the first time, with the active adapter."""
        key = (what, self.active_adapter, task.name)
        is_first = key not in self._checked
        self._checked.add(key)
        return is_first

    def generate(
        self,
        task: Task,
        prompts: list[Sequence],
        batch_size: int = 64,
        decoding: Mapping[str, Any] | None = None,
        numbers: Items[int] | None = None,
    ) -> list[Generated]:
        """Decode prompts of one task with its defaults and this model's precision. `numbers`: of the prompts, for
        their random numbers (0, 1, ... by default)."""
        options = Decoding.of(**{**task.decode, **(decoding or {})})
        if task.sketch:
            with self.precision():
                return refine(self.model, prompts, self.processor.tokenizer, options.max_new_tokens, batch_size)
        with self.precision():
            return generate(self.model, prompts, self.processor.tokenizer.end_id, options, batch_size, numbers)

    def read(self, task: Task, generated: Generated) -> Any:
        """The value of a task's one output, or the dict of its outputs."""
        return task.value(generated.ids, self.processor)

    def precision(self) -> AbstractContextManager[Any]:
        """bf16 products for a model with fp32 weights, where the machine has units for them; else nothing. Everything
        that asks the network does so inside."""
        if self._adapters:
            self._adapters.active.name = self.active_adapter or None
        model = self.model
        kind = model.embed.weight.device.type
        fp32 = model.embed.weight.dtype == torch.float32 and model.packed_head is None
        if fp32 and fast_dtype(kind) == torch.bfloat16:
            return torch.autocast(kind, torch.bfloat16)
        return nullcontext()


def _truncating(records: Iterable[Record], truncate: str | None) -> Iterable[Record]:
    return records if truncate is None else ({**record, TRUNCATE: truncate} for record in records)


def check_dims(model: M6, dims: Any) -> int | None:
    """To how many numbers vectors are cut; None: they are not. Raises UsageError where they cannot be."""
    if dims is None:
        return None
    is_number = isinstance(dims, Real)
    if not is_number or not 1 <= dims <= model.config.hidden_size or dims != dims // 1:
        raise UsageError(
            f"dims is {dims}; vectors of this model have 1 to {model.config.hidden_size} numbers.", param="dims"
        )
    return int(dims)
