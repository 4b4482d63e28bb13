"""Bundle: a model directory (network, tokenizer, tasks) and what one does with it.

    config.json, model.safetensors      the network, as transformers saves it
    tokenizer.json, tokenizer_config.json
    codec/                              the image codec of a model that draws
    openm6.json                         how records become sequences, and the tasks it was trained on

A directory with an adapter (model/adapters.py) has openm6.json and the adapter; all else is the model's beneath it.
Nothing in it is unpickled and no code in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openm6.decode import Decoding, Generated, generate, stream
from openm6.decode.draw import OPEN, Codes, Drawing, draw, estimate
from openm6.errors import DataError, OpenM6Error, UsageError, suggest
from openm6.images import ImageGrid
from openm6.model import M6
from openm6.model.adapters import base_of, merge_adapter
from openm6.model.files import check_model, load_model, meta_model, quietly
from openm6.model.precision import fast_dtype
from openm6.sequence import Sequence, pad
from openm6.tasks.drawn import ESTIMATES
from openm6.tasks.library import get as get_task
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.tokenizer import Tokenizer

Record = Mapping[str, Any]

CODEC = "codec"
"""Folder of a model directory with the image codec of a model that draws."""

KEPT = "_kept"
"""In a record of a task that draws: the codes that are given."""


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

    def __init__(self, model: M6, processor: Processor, tasks: Iterable[Task] = (), path: Path | None = None):
        self.model = model
        self.processor = processor
        self.tasks = {task.name: task for task in tasks}
        self.path = path

    # Files

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None, trainable: bool = False) -> Bundle:
        """Open a model directory, on the GPU when there is one. An adapter's comes with the model beneath it.

        For answering, weights are bf16 on a GPU and laid out for its kernels on a CPU; a `trainable` model
        keeps fp32 weights and runs its products under autocast. On the device "meta" it has shapes, and no weights yet.
        """
        path = Path(path)
        card = path / "openm6.json"
        if not card.is_file():
            raise UsageError(
                f"{path} is no OpenM6 model: it has no openm6.json. `openm6 train` and `openm6 models import` make one."
            )
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            content = json.loads(card.read_text("utf-8"))
            tasks = [Task.from_dict(d) for d in content["tasks"]]
            length = int(content["max_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise OpenM6Error(f"{card} is damaged ({type(error).__name__}).") from None
        place = base_of(path) or path
        model = meta_model(check_model(place)) if device.type == "meta" else load_model(place).eval()
        if place != path:
            model = merge_adapter(model, path).eval()
        model.to(device)  # type: ignore[arg-type]
        if not trainable and device.type == "cuda":
            model.to(fast_dtype("cuda"))  # type: ignore[arg-type]
        elif not trainable:
            model.pack_for_cpu()
        grid = ImageGrid(model.config.image_stride, model.config.image_max_patches)
        codec = PictureCodec.load(place / CODEC) if (place / CODEC).is_dir() else None
        return cls(model, Processor(Tokenizer.load(place), grid, length, codec), tasks, path)

    def save(self, path: str | Path, max_shard_size: str = "4GB") -> None:
        """Write the model directory (the caller makes it atomic where that matters)."""
        path = Path(path)
        self.describe(path)
        quietly()
        self.model.save_pretrained(path, max_shard_size=max_shard_size)

    def describe(self, path: Path, adapter: Any = None) -> None:
        """Write all of a model directory but the weights; with PEFT's configuration of an `adapter`, of one that holds
        that adapter."""
        path.mkdir(parents=True, exist_ok=True)
        if adapter is not None:
            adapter.save_pretrained(path)
        else:
            self.model.config.save_pretrained(path)
            self.processor.tokenizer.save(path)
            if self.processor.codec is not None:
                self.processor.codec.save(path / CODEC)
        content = {"max_length": self.processor.max_length, "tasks": [t.to_dict() for t in self.tasks.values()]}
        (path / "openm6.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")

    # Use

    def task(self, name: str | Task) -> Task:
        """A task of this model by name, else one of the library by name or YAML path."""
        if isinstance(name, Task):
            return name
        return self.tasks.get(name) or get_task(name)

    def run(self, task: str | Task, *, decoding: Mapping[str, Any] | None = None, **slots: Any) -> Any:
        """One answer. `m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")`.

        A task with one output gives its value, a task with several a dict. `decoding` overrides the task's
        own options (see Decoding).
        """
        task = self.task(task)
        _check_slots(task, slots)
        return next(iter(self.run_many(task, [slots], decoding=decoding)))

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
        for group in _groups(records, batch_size * 4):
            prompts = [self.prompt(task, record) for record in group]
            for generated in self.generate(task, prompts, batch_size, decoding):
                yield self.read(task, generated)

    def stream(self, task: str | Task, *, decoding: Mapping[str, Any] | None = None, **slots: Any) -> Iterator[str]:
        """One text answer in pieces, as it is written."""
        task = self.task(task)
        if task.draws:
            raise UsageError(f"The task {task.name} draws a picture, which does not come in pieces: run it.")
        options = Decoding.of(**{**task.decode, **(decoding or {})})
        ids: list[int] = []
        text = told = ""
        with self.precision():
            for token in stream(
                self.model,
                self.prompt(task, slots),
                self.processor.tokenizer.end_id,
                options,
            ):
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
                kept = _kept([r.get(KEPT) for r in group for _ in range(candidates)], codes)
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
        return task.encode(record, self.processor, rng=None, with_target=False)

    def generate(
        self, task: Task, prompts: list[Sequence], batch_size: int = 64, decoding: Mapping[str, Any] | None = None
    ) -> list[Generated]:
        """Decode prompts of one task with its defaults and this model's precision."""
        options = Decoding.of(**{**task.decode, **(decoding or {})})
        with self.precision():
            return generate(self.model, prompts, self.processor.tokenizer.end_id, options, batch_size)

    def read(self, task: Task, generated: Generated) -> Any:
        """The value of a task's one output, or the dict of its outputs."""
        answer = task.read(generated.ids, self.processor)
        return next(iter(answer.values())) if len(answer) == 1 else answer

    def precision(self) -> torch.autocast:
        """bf16 products for a model with fp32 weights, where the machine has units for them; else nothing."""
        model = self.model
        kind = model.embed.weight.device.type
        fp32 = model.embed.weight.dtype == torch.float32 and model.packed_head is None
        return torch.autocast(kind, torch.bfloat16, enabled=fp32 and fast_dtype(kind) == torch.bfloat16)


def _in_passes(task: Task, decoding: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options, in passes where they do not say otherwise, though the task draws one code after the other."""
    return {"passes": task.decode.get("passes") or Drawing().passes, **(decoding or {})}


def _kept(given: list[np.ndarray | None], codes: Codes) -> torch.Tensor:
    """Codes that are given, OPEN elsewhere, int64 [B, count]."""
    kept = torch.full((len(given), codes.count), OPEN)
    for row, one in zip(kept, given, strict=True):
        if one is not None:
            found = torch.as_tensor(np.asarray(one).ravel().astype(np.int64))
            if len(found) != codes.count or found.min() < OPEN or found.max() >= codes.number:
                raise DataError(f"What is kept of a picture has to be {codes.count} codes below {codes.number}, or -1.")
            row[:] = found
    return kept


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
