"""Bundle: a model directory (directory.py) and what one does with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openm6.decode import Decoding, Generated, generate, stream
from openm6.decode.draw import Codes, Drawing, draw, estimate, kept_codes
from openm6.decode.refine import refine
from openm6.directory import Adapters, describe, open_directory
from openm6.errors import UsageError, suggest
from openm6.model import M6
from openm6.model.files import quietly
from openm6.model.precision import fast_dtype
from openm6.sequence import Sequence, pad
from openm6.tasks.drawn import ESTIMATES
from openm6.tasks.library import get as get_task
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

Record = Mapping[str, Any]

KEPT = "_kept"
"""In a record of a task that draws: the codes that are given."""

SHOTS = "_shots"
"""In a record: other records with their answers, examples of what is asked for."""


@dataclass(frozen=True, slots=True)
class Painting:
    """A drawn picture, the `number`-th of its wish, its codes int64 [side * side], and what the model thinks of it:
    log-odds of relevance, fidelity and quality, and the score that ranks."""

    image: Image.Image
    number: int
    codes: np.ndarray
    estimates: dict[str, float]
    score: float


class Bundle:
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
        self._adapters, self._chosen = adapters, ""

    # Files

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        trainable: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Bundle:
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
        quietly()
        self.model.save_pretrained(path, max_shard_size=max_shard_size)

    def describe(self, path: Path, adapter: Any = None) -> None:
        """Write all of a model directory but the weights (see directory.describe)."""
        describe(path, self.model, self.processor, self.tasks.values(), adapter)

    # Use

    def adapter(self, name: str | None) -> Bundle:
        """This model as one of its adapters changes it, or without any (None); the weights are shared, and nothing is
        loaded: `m6.adapter("copy").run("slogan", ...)`. Of all views of a model one at a time may work."""
        known = self._adapters.tasks if self._adapters else {}
        if name is not None and name not in known:
            there = f"It has: {', '.join(known)}." if known else "It was opened without any (adapters={...})."
            raise UsageError(f"The model has no adapter {name}.{suggest(name, list(known))} {there}")
        tasks = [*self.tasks.values(), *(known[name] if name else [])]
        view = Bundle(self.model, self.processor, tasks, self.path, self._adapters)
        view._chosen = name or ""
        return view

    def task(self, name: str | Task) -> Task:
        """A task of this model by name, else one of the library by name or YAML path."""
        if isinstance(name, Task):
            return name
        return self.tasks.get(name) or get_task(name)

    def run(
        self,
        task: str | Task,
        *,
        decoding: Mapping[str, Any] | None = None,
        examples: Items[Record] = (),
        **slots: Any,
    ) -> Any:
        """One answer. `m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")`.

        A task with one output gives its value, a task with several a dict. `decoding` overrides the task's own options
        (see Decoding). `examples`: records with answers, to be told what is asked for (data.*.shots in training).
        """
        task = self.task(task)
        _check_slots(task, slots)
        return next(iter(self.run_many(task, [{**slots, SHOTS: examples}], decoding=decoding)))

    def draw(
        self,
        task: str | Task,
        *,
        candidates: int = 1,
        decoding: Mapping[str, Any] | None = None,
        kept: np.ndarray | None = None,
        **slots: Any,
    ) -> list[Painting]:
        """Candidates for one wish, the best first: `m6.draw("text_to_image", candidates=8, caption="红裙子")`.

        `kept`, int [side * side]: codes that are given; -1 is drawn, in passes, so that it sees what is kept behind it.
        """
        task = self._drawing(task)
        _check_slots(task, slots)
        if kept is not None:
            decoding = _in_passes(task, decoding)
        records = [{**slots, KEPT: kept}]
        return next(iter(self.draw_many(task, records, candidates=candidates, decoding=decoding)))

    def run_many(
        self,
        task: str | Task,
        records: Iterable[Record],
        *,
        batch_size: int = 64,
        decoding: Mapping[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Answers to many records, in their order; read and answered `batch_size` x 4 at a time."""
        task = self.task(task)
        if task.draws:
            for best in self.draw_many(task, records, batch_size=batch_size, decoding=decoding):
                yield best[0].image
            return
        if task.embeds:
            dims = (decoding or {}).get("dims")
            yield from self.vectors(task, records, batch_size=batch_size, dims=None if dims is None else int(dims))
            return
        for group in _groups(records, batch_size * 4):
            prompts = [self.prompt(task, record) for record in group]
            for generated in self.generate(task, prompts, batch_size, decoding):
                yield self.read(task, generated)

    @torch.inference_mode()
    def vectors(
        self, task: str | Task, records: Iterable[Record], *, batch_size: int = 64, dims: int | None = None
    ) -> Iterator[np.ndarray]:
        """The vector of each record, fp32 [dims] of length 1, by a task that gives one; `dims` cuts it (all numbers by
        default)."""
        task, width = self.task(task), self.model.config.hidden_size
        if not task.embeds:
            raise UsageError(f"The task {task.name} gives no vector: it writes {', '.join(task.outputs)}.")
        if dims is not None and not 1 <= dims <= width:
            raise UsageError(f"dims is {dims}; vectors of this model have 1 to {width} numbers.")
        for group in _groups(records, batch_size * 4):
            prompts = [self.prompt(task, record) for record in group]
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little is padded
            found = torch.empty(len(group), dims or width)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = pad([prompts[i] for i in chosen], self.processor.tokenizer.pad_id)
                with self.precision():
                    hidden = self.model(batch.to(self.model.embed.weight.device)).hidden
                ends = hidden.flatten(0, 1)[batch.ends().to(hidden.device)].float().cpu()
                found[chosen] = torch.nn.functional.normalize(ends[:, :dims], dim=-1)
            yield from found.numpy()

    def stream(self, task: str | Task, *, decoding: Mapping[str, Any] | None = None, **slots: Any) -> Iterator[str]:
        """One text answer in pieces, as it is written."""
        task = self.task(task)
        if task.draws:
            raise UsageError(f"The task {task.name} draws a picture, which does not come in pieces: run it.")
        if task.sketch:  # all of it is decided at once
            yield str(next(iter(self.run_many(task, [slots], decoding=decoding))))
            return
        if task.embeds:
            raise UsageError(f"The task {task.name} gives a vector, which does not come in pieces: run it.")
        options = Decoding.of(**{**task.decode, **(decoding or {})})
        ids: list[int] = []
        text = told = ""
        with self.precision():
            for token in stream(self.model, self.prompt(task, slots), self.processor.tokenizer.end_id, options):
                ids.append(token)
                text = self.processor.tokenizer.decode(ids)
                # A character can be several tokens: what is not yet whole shows as U+FFFD and waits. Whether single
                # bytes are a character is known when other text ends their row.
                if not text.endswith("�") and not self.processor.tokenizer.is_part(token):
                    yield text[len(told) :]
                    told = text
        if text != told:
            yield text[len(told) :]

    def draw_many(
        self,
        task: str | Task,
        records: Iterable[Record],
        *,
        candidates: int = 1,
        batch_size: int = 64,
        decoding: Mapping[str, Any] | None = None,
    ) -> Iterator[list[Painting]]:
        """For each record `candidates` pictures of a task that draws, the best by the model's own estimates first.

        `decoding` overrides the task's options (see Drawing). A record may have codes that are given (KEPT).
        """
        task = self._drawing(task)
        if decoding and int(decoding.get("branches", 1)) > 1:
            decoding = _in_passes(task, decoding)
        options = Drawing.of(**{**task.decode, **(decoding or {})})
        codec, codes = self.codec, self._codes()
        droppable = {name for name in task.inputs if task.slots[name].drop}
        if options.guidance and not droppable:
            raise UsageError(f"The task {task.name} has no slot that can be dropped: guidance has nothing to leave.")
        if candidates < 1:
            raise UsageError(f"candidates is {candidates}; draw 1 or more.")
        done = 0
        for group in _groups(records, max(1, batch_size // candidates)):
            prompts = [self.prompt(task, record) for record in group for _ in range(candidates)]
            free = [self.prompt(task, {k: v for k, v in r.items() if k not in droppable}) for r in group]
            free = [prompt for prompt in free for _ in range(candidates)]
            with self.precision():
                kept = kept_codes([r.get(KEPT) for r in group for _ in range(candidates)], codes)
                numbers = range(done, done + len(prompts))
                drawn = draw(self.model, prompts, free, codes, options, kept, numbers)
            done += len(prompts)
            rows = zip(drawn.codes.cpu().numpy(), drawn.estimates.tolist(), drawn.score(options).tolist(), strict=True)
            made = [
                Painting(codec.decode(row), place % candidates, row, dict(zip(ESTIMATES, told, strict=True)), score)
                for place, (row, told, score) in enumerate(rows)
            ]
            if candidates > 1 and options.reading:
                made = self._read_back(task, made, [r for r in group for _ in range(candidates)], options.reading)
            for start in range(0, len(made), candidates):
                yield sorted(made[start : start + candidates], key=lambda p: -p.score)

    def _read_back(self, task: Task, made: list[Painting], asked: list[Record], weight: float) -> list[Painting]:
        """The pictures, where the model has learned the task's reader and there was asked for what it writes with the
        log-probability of writing it from the picture (`reading`) among the estimates and in the score."""
        reader = self.tasks.get(task.reader)
        if reader is None:
            return made
        places = [i for i, record in enumerate(asked) if all(record.get(n) is not None for n in reader.outputs)]
        picture = next((name for name in reader.inputs if reader.slots[name].type == "image"), None)
        if picture is None:
            raise UsageError(f"The reader of the task {task.name}, {reader.name}, takes no picture.")
        records = [{picture: made[i].image, **{n: asked[i][n] for n in reader.outputs}} for i in places]
        for i, value in zip(places, (-self.target_losses(reader, records)[0]).tolist(), strict=True):
            told = {**made[i].estimates, "reading": value}
            made[i] = replace(made[i], estimates=told, score=made[i].score + weight * value)
        return made

    @torch.inference_mode()
    def target_losses(
        self, task: str | Task, records: Items[Record], batch_size: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-probability of the outputs that records have, given their inputs, fp64 [N], and of how many
        tokens, int64 [N]; of several references the first one's."""
        task, pad_id = self.task(task), self.processor.tokenizer.pad_id
        sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
        for start in range(0, len(records), batch_size):
            some = records[start : start + batch_size]
            batch = pad([task.encode(record, self.processor, rng=None) for record in some], pad_id)
            with self.precision():
                out = self.model(batch.to(self.model.embed.weight.device))
            total, trained = out.by_example(len(some))
            sums.append(total.cpu())
            counts.append(trained.cpu())
        return torch.cat(sums), torch.cat(counts)

    def relevance_by_slot(self, task: str | Task, drawn: list[Painting], **slots: Any) -> dict[str, list[float]]:
        """How well pictures follow each given slot that may be dropped, by itself: log-odds by slot. Where what was
        asked for contradicts itself it tells which part won."""
        task = self._drawing(task)
        codes = torch.from_numpy(np.stack([painting.codes for painting in drawn]))
        droppable = [name for name in task.inputs if task.slots[name].drop]
        found = {}
        for name in droppable:
            if slots.get(name) is None:
                continue
            alone = self.prompt(task, {k: v for k, v in slots.items() if k == name or k not in droppable})
            with self.precision():
                told = estimate(self.model, [alone] * len(codes), codes, self._codes()).estimates
            found[name] = told[:, ESTIMATES.index("relevance")].tolist()
        return found

    def _drawing(self, task: str | Task) -> Task:
        task = self.task(task)
        if not task.draws:
            raise UsageError(f"The task {task.name} does not draw: it writes {', '.join(task.outputs)}.")
        return task

    @property
    def codec(self) -> PictureCodec:
        """Of a model that draws; of another a UsageError."""
        if self.processor.codec is None:
            raise UsageError("This model does not draw: it has no image codec (model.codec in its recipe).")
        return self.processor.codec

    def _codes(self) -> Codes:
        codec, tokenizer = self.codec, self.processor.tokenizer
        return Codes(
            tokenizer.code_start, codec.num_codes, codec.side**2, tokenizer.mask_id, tokenizer.estimate_ids,
            tokenizer.yes_id, tokenizer.no_id,
        )  # fmt: skip

    def prompt(self, task: Task, record: Record) -> Sequence:
        return task.encode(record, self.processor, None, with_target=False, shots=record.get(SHOTS, ()))

    def generate(
        self, task: Task, prompts: list[Sequence], batch_size: int = 64, decoding: Mapping[str, Any] | None = None
    ) -> list[Generated]:
        """Decode prompts of one task with its defaults and this model's precision."""
        options = Decoding.of(**{**task.decode, **(decoding or {})})
        if task.sketch:
            with self.precision():
                return refine(self.model, prompts, self.processor.tokenizer, options.max_new_tokens, batch_size)
        with self.precision():
            return generate(self.model, prompts, self.processor.tokenizer.end_id, options, batch_size)

    def read(self, task: Task, generated: Generated) -> Any:
        """The value of a task's one output, or the dict of its outputs."""
        answer = task.read(generated.ids, self.processor)
        return next(iter(answer.values())) if len(answer) == 1 else answer

    def precision(self) -> torch.autocast:
        """bf16 products for a model with fp32 weights, where the machine has units for them; else nothing. Everything
        that asks the network does so inside."""
        if self._adapters:
            self._adapters.active.name = self._chosen or None
        model = self.model
        kind = model.embed.weight.device.type
        fp32 = model.embed.weight.dtype == torch.float32 and model.packed_head is None
        return torch.autocast(kind, torch.bfloat16, enabled=fp32 and fast_dtype(kind) == torch.bfloat16)


def _in_passes(task: Task, decoding: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options, in passes where they do not say otherwise, though the task draws one code after the other."""
    return {"passes": task.decode.get("passes") or Drawing().passes, **(decoding or {})}


def _check_slots(task: Task, slots: Record) -> None:
    for name in slots:
        if name not in task.slots:
            raise UsageError(
                f"The task {task.name} has no slot {name}.{suggest(name, task.inputs)} It takes: "
                f"{', '.join(task.inputs) or 'nothing'}."
            )
    for name in task.inputs:
        if name not in slots and not task.slots[name].drop:
            raise UsageError(f"{name} is missing: the task {task.name} takes {', '.join(task.inputs)}.")


def _groups(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
