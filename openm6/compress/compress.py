"""Compression of a model to a target: a chain of steps, each measured, or a search among chains.

The steps of a chain, in order, each applied to the result of the one before:

    prune      fewer layers, heads, units, experts (weights/prune.py)
    distill    further training with the first model as the teacher (train/distill.py)
    quantize   weights in 8 or 4 bits (model/lowbit.py), for PyTorch
    export     an ONNX bundle (edge/package.py), without PyTorch

A search goes from the whole network to ever smaller ones, pruned and distilled, each in 32, 8 and 4 bits, until one
meets the target without losing more than allowed; the result is then the one that was pruned the least.

    OUTPUT/chain.yaml       the chain; another chain needs another folder
    OUTPUT/N-KIND, ...      the result of each step, with its measurements beside it (KIND.json)
    OUTPUT/table.json, report.md, pareto.png, best
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openm6.compress.compressed import Target, draw_pareto, line_of, lost, nearest, report_of
from openm6.compress.convert import prune_model, quantize_model
from openm6.core.bases import directory_hash
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import dumps, plain, write_json, write_text, write_whole
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.edge.package import export, quantize_bundle
from openm6.edge.runner import EdgeModel
from openm6.evaluate.command import measure
from openm6.evaluate.measure import Case, as_said, references, scored
from openm6.inference.session import Session
from openm6.model.adapters import check_whole
from openm6.model.config import ModelConfig
from openm6.model.files import read_config
from openm6.tasks.card import read_card
from openm6.tasks.library import get as get_task
from openm6.train.explain import explain
from openm6.train.finetune import finetune_recipe
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

LEVELS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)
"""Fractions of the blocks' parameters that a search keeps, in turn."""
BATCH = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskSection(_Strict):
    """A task of the small model."""

    task: str
    data: str = Field(description="training records")
    validation: str = Field(description="held-out records to measure on")
    unlabelled: str | None = Field(None, description="records without answers, labelled by the first model")
    columns: dict[str, str] = Field(default_factory=dict)
    limit: int = Field(500, ge=1, description="number of records to measure on")


class PruneStep(_Strict):
    layers: int | None = Field(None, ge=1)
    key_value_heads: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    experts: int | None = Field(None, ge=1)
    records: int = Field(128, ge=1, description="number of records to estimate effects with")


class DistillStep(_Strict):
    steps: int = Field(300, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float | None = Field(None, gt=0, description="default: 5e-4, or 1e-3 from a preset")
    weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    relations: float = Field(0.0, ge=0)
    preset: str | None = Field(None, description="start from random weights of a preset instead of the model before")
    sizes: dict[str, Any] = Field(default_factory=dict, description="values of the preset to change")


class BitsStep(_Strict):
    bits: int | None = None


class Step(_Strict):
    """A step of a chain: one of its fields is set."""

    prune: PruneStep | None = None
    distill: DistillStep | None = None
    quantize: BitsStep | None = None
    export: BitsStep | None = None

    @property
    def kind(self) -> str:
        names = type(self).model_fields
        found = [name for name in names if getattr(self, name) is not None]
        if len(found) != 1:
            raise UsageError(f"A step is one of {', '.join(names)}, this one is {found or 'nothing'}.")
        return found[0]


class Chain(_Strict):
    model: Path
    output: Path
    tasks: list[TaskSection] = Field(min_length=1)
    steps: list[Step] = Field(default_factory=list)
    seed: int = 0


def check_chain(values: dict[str, Any], where: str = "chain") -> Chain:
    """Raises UsageError, which names key and value."""
    try:
        chain = Chain.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, Chain)}") from None
    for step in chain.steps:
        _ = step.kind
    return chain


def compress(chain: Chain, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Run a chain, or resume an interrupted one. Returns a row of the table for the model itself and for each step."""
    work = _Work(chain, say)
    rows = [work.row("0-model", chain.model)]
    before = chain.model
    for number, step in enumerate(chain.steps, 1):
        row = work.step(f"{number}-{step.kind}", step, before)
        rows.append(row)
        if step.kind in ("prune", "distill"):
            before = Path(row["path"])
    work.report(rows)
    return rows


def search(
    chain: Chain, target: Target, max_loss: float, form: str = "package", distill: DistillStep | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, str]:  # fmt: skip
    """Try chains until one meets the target and loses at most `max_loss` of the first metric of each task, as a
    fraction of the model's own value. Returns the table, and the row that does, or None and a sentence about the
    nearest rows."""
    if form not in ("package", "model"):
        raise UsageError(f"form is {form}; it can be package or model.")
    if not 0 <= max_loss < 1:
        raise UsageError(f"max_loss is {max_loss}: a fraction from 0 to below 1.")
    distill = distill or DistillStep()
    work = _Work(chain, say, distill)
    parent = work.row("0-model", chain.model)
    rows, found, tried = [parent], None, list[dict[str, Any]]()
    for level, steps in _levels(read_config(chain.model), distill):
        before, whole, name = chain.model, parent, f"{level:.0%}".rstrip("%")
        for step in steps:
            whole = work.step(f"{name}-{step.kind}", step, before)
            rows.append(whole)
            before = Path(whole["path"])
        kind = "export" if form == "package" else "quantize"
        for bits in (None, 8, 4) if kind == "export" else (8, 4):
            row = work.step(f"{name}-{kind}-{bits or 32}", Step.model_validate({kind: {"bits": bits}}), before)
            rows.append(row)
            tried.append(row)
            if bits is None:
                before = Path(row["path"])  # the others quantize this bundle
            if target.is_met(row) and lost(parent, row) <= max_loss + 1e-9:
                found = row if found is None or lost(parent, row) < lost(parent, found) else found
        if found or lost(parent, whole) > 4 * max(max_loss, 0.01):  # smaller ones lose more
            break
    near = "" if found else nearest(tried, parent, target, max_loss)
    work.report(rows, target, max_loss, found, near)
    return rows, found, near


def _levels(config: ModelConfig, distill: DistillStep) -> Iterator[tuple[float, list[Step]]]:
    """Chains from the whole network down: (fraction of the parameters, steps). Layers and their widths shrink about
    equally."""
    seen: list[dict[str, int]] = []
    for level in LEVELS:
        side = math.sqrt(level)
        sizes: dict[str, int] = {
            "layers": max(1, round(config.num_hidden_layers * side)),
            "width": max(32, round(config.intermediate_size * side / 32) * 32),
            "key_value_heads": max(1, round(config.num_key_value_heads * side)),
        }  # fmt: skip
        if config.num_experts:
            number = max(config.experts_per_token, round(config.num_experts * side))
            groups = config.expert_groups
            sizes["experts"] = max(groups, number // groups * groups)
            if len(config.expert_layers()) == config.num_hidden_layers:
                del sizes["width"]
        own = {"layers": config.num_hidden_layers, "width": config.intermediate_size,
               "key_value_heads": config.num_key_value_heads, "experts": config.num_experts}  # fmt: skip
        fewer = {name: count for name, count in sizes.items() if count < own[name]}
        if fewer not in seen:
            seen.append(fewer)
            yield level, [Step(prune=PruneStep(**fewer)), Step(distill=distill)] if fewer else []


class _Work:
    """A folder in which each step runs once."""

    def __init__(self, chain: Chain, say: Callable[[str], None], distill: DistillStep | None = None):
        check_whole(chain.model)
        self.chain, self.say = chain, say
        values = chain.model_dump(mode="json", exclude={"output"})
        sources = [s for task in chain.tasks for s in (task.data, task.validation, task.unlabelled) if s]
        # Results for another model or other data are stale.
        values["content"] = [directory_hash(chain.model), *(open_source(source).content_hash() for source in sources)]
        if distill:  # of a search
            values["distill"] = distill.model_dump(mode="json")
        file = chain.output / "chain.yaml"
        if file.is_file():
            if yaml.safe_load(file.read_text("utf-8")) != values:
                raise UsageError(
                    f"{chain.output} holds another chain, or one of another model or other data: name another folder, "
                    "or delete it."
                )
        else:
            chain.output.mkdir(parents=True, exist_ok=True)
            write_text(file, yaml.safe_dump(values, allow_unicode=True, sort_keys=False))

    def step(self, name: str, step: Step, before: Path) -> dict[str, Any]:
        """Run a step, unless it is done, and measure its result."""
        place = self.chain.output / name
        if step.distill:
            made = place / "model"
            if not (made / "config.json").is_file():
                self.say(f"{name}: {step.distill.steps} steps")
                train(check_recipe(self._distilling(step.distill, before, place)))
            return self.row(name, made)
        if not place.is_dir():
            self.say(name)
            if step.prune:
                task = self.chain.tasks[0]
                sizes = step.prune.model_dump(exclude={"records"})
                prune_model(before, place, task.task, task.data, task.columns, step.prune.records, **sizes)
            elif step.quantize:
                quantize_model(before, place, step.quantize.bits or 8)
            elif step.export and step.export.bits and (before / "edge.json").is_file():
                quantize_bundle(before, place, step.export.bits)
            elif step.export:
                export(before, place, step.export.bits)
        return self.row(name, place)

    def _distilling(self, step: DistillStep, before: Path, place: Path) -> dict[str, Any]:
        first = self.chain.tasks[0]
        values = finetune_recipe(
            before, first.task, [first.data], output=place, steps=step.steps, batch_size=step.batch_size,
            columns=first.columns, teacher=self.chain.model, seed=self.chain.seed,
        )  # fmt: skip
        for task in self.chain.tasks:
            about = {"task": task.task, "columns": task.columns}
            if task is not first:
                values["data"].append({"source": task.data, **about})
            if task.unlabelled:
                values["data"].append({"source": task.unlabelled, **about, "answers": "teacher"})
        if step.preset:
            values["model"] = {"preset": step.preset, "sizes": step.sizes}
        values["distill"] |= {"weight": step.weight, "temperature": step.temperature, "relations": step.relations}
        rate = step.learning_rate or (1e-3 if step.preset else 5e-4)
        values["train"] |= {"learning_rate": rate, "matrix_learning_rate": 2 * rate, "workers": 0}
        return values

    def row(self, name: str, made: Path) -> dict[str, Any]:
        """The row of a model or bundle in the table, measured unless it was before."""
        file = self.chain.output / f"{name}.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text("utf-8"))
            return found
        row = {"step": name, "path": str(made), **_footprint(made, self.chain), "metrics": _metrics(made, self.chain)}
        write_json(file, row)
        self.say(line_of(row))
        return row

    def report(
        self, rows: list[dict[str, Any]], target: Target | None = None, max_loss: float = 0.0,
        found: dict[str, Any] | None = None, near: str = "",
    ) -> None:  # fmt: skip
        output = self.chain.output
        content = {"rows": rows, "target": target and asdict(target), "max_loss": max_loss, "found": found}
        write_json(output / "table.json", content)
        write_text(output / "report.md", report_of(rows, target, max_loss, found, near))
        draw_pareto(rows, target, max_loss).savefig(output / "pareto.png", dpi=110)
        if found:
            best = Path(found["path"])

            def write(place: Path) -> None:
                shutil.copytree(best, place, dirs_exist_ok=True)

            write_whole(output / "best", write)


def _metrics(made: Path, chain: Chain) -> dict[str, dict[str, float]]:
    """The metrics of each task on its validation records."""
    bundle = EdgeModel(made) if (made / "edge.json").is_file() else None
    session = None if bundle else Session.load(made)
    metrics = {}
    for section in chain.tasks:
        if bundle is None:
            assert session is not None
            found = measure(
                session, section.task, section.validation, section.columns, limit=section.limit, truncate="start"
            ).values()
        else:
            task = bundle.task(section.task)
            source = open_source(section.validation, limit=section.limit)
            view, output, cases = SlotView.of(task, source, section.columns), task.outputs[0], []
            for record in map(view, source):
                value = bundle.run(task.name, truncate="start", **task.asked(record))
                value = value[output] if len(task.outputs) > 1 else value
                kind = task.slots[output].type
                cases.append(Case(record, as_said(value, kind), references(record[output], kind)))
            found = {name: scored(task, name, cases).value for name in task.metrics if name != "perplexity"}
        metrics[section.task] = {name: round(value, 5) for name, value in found.items()}
    return metrics


def _footprint(made: Path, chain: Chain) -> dict[str, Any]:
    """Parameters, bytes, and, in a process of its own (footprint_of.py), the peak of its memory and milliseconds for 1
    and 16 answers."""
    section = chain.tasks[0]
    own = {task.name: task for task in read_card(made)[0]}
    task = own.get(section.task) or get_task(section.task)
    source = open_source(section.validation, limit=BATCH)
    view = SlotView.of(task, source, section.columns)
    records = [task.asked(view(record)) for record in source]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        file.write_bytes(dumps((records * BATCH)[:BATCH], plain).encode())
        words = [sys.executable, "-m", "openm6.plan.footprint_of", str(made), section.task, str(file)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OpenM6Error(f"{made} could not be measured: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"bytes": sum(f.stat().st_size for f in made.rglob("*") if f.is_file()), **found}
