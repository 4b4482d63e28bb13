"""A box from a model, its calibration, and what it learns of the cloud's answers.

A round of learning is a training like any other (`openm6 train`), on what the box kept and on the data that it was
calibrated with; killed, it goes on where it was. Its model is exported, and measured beside the one that answers: on
the kept answers that were held out of learning, and on the calibration's records. Only one that is better by more than
chance is promoted (promotion.py).

    learning/plan.json   what this round learns, fixed when it begins
    learning/run         the training
    learning/version     the version that it makes; moved to versions/ when it is whole
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openm6.core.bases import base_of, require_model
from openm6.core.errors import OpenM6Error, UsageError, suggest
from openm6.core.files import publish, require_new, write_file, write_json, write_whole
from openm6.data.columns import SlotView
from openm6.data.overlap import digest
from openm6.data.source import Source, open_source
from openm6.data.store import ListRecords, Record, iterate
from openm6.edge.box import EYES, FILE, VERSIONS, Box
from openm6.edge.kept import is_empty, is_held_out, open_answer_store
from openm6.edge.package import export, export_image_encoder, write_program
from openm6.edge.runner import EdgeModel, about_of
from openm6.edge.settings import FEATURES, NOTHING, Settings, written
from openm6.edge.sureness import ConfidenceCalibrator, agreement
from openm6.model.adapters import check_whole
from openm6.model.files import image_encoder_id
from openm6.tasks.card import read_card
from openm6.tasks.task import Task
from openm6.train.promotion import check_apart, gain, not_trained_on, reason_against, told_counts

LEARNING = "learning"
CALIBRATION = "calibration.json"
LEAST = 50
"""Minimum of the cloud's answers for a round, and of records for a task's calibration."""
REPLAY = 3.0
"""Weight of the replayed data, relative to the stored answers."""
VERSIONS_KEPT = 3


def init_box(path: Path, model: Path, settings: Settings, bits: int | None = 8, cloud_model: Path | None = None) -> Box:
    """Make a box of a model directory. `cloud_model`: that of the cloud, which features are sent to.

    Raises UsageError where that cannot be.
    """
    require_new(path)
    check_whole(model)
    if settings.privacy == FEATURES and cloud_model is None:
        raise UsageError("To send features the box needs the eyes of the cloud's model: --cloud-model DIRECTORY.")
    for directory in filter(None, (model, cloud_model)):
        require_model(base_of(directory) or directory)

    def write(folder: Path) -> None:
        first = folder / VERSIONS / "0001"
        first.mkdir(parents=True)
        shutil.copytree(model, first / "model")
        export(model, first / "package", bits)
        if cloud_model is not None:
            export_image_encoder(cloud_model, folder / EYES)
        write_program(folder / "openm6-edge")
        (folder / FILE).write_text(written(settings), "utf-8")
        (folder / "current").write_text("0001\n", "utf-8")

    write_whole(path, write)
    return Box(path)


# Calibration


def calibrate_box(
    box: Box,
    task: str,
    data: str,
    columns: Mapping[str, str] | None = None,
    records: int = 500,
    max_loss: float = 0.004,
) -> dict[str, float]:
    """Fit a task's ConfidenceCalibrator to records with answers, and remember them for the versions to come.

    `max_loss`: largest fraction of wrong answers, of all, that are given without deferral. Returns the expected rates.
    Raises UsageError for a task that the model does not write.
    """
    if not 0 < max_loss < 1:
        raise UsageError(f"max_loss is {max_loss}: a fraction between 0 and 1.")
    entry = {"data": data, "columns": dict(columns or {}), "records": records, "max_loss": max_loss}
    folder = box.folder()
    found = _calibrated(EdgeModel(folder / "package"), task, entry)
    _save(found, folder / "package", task)
    write_json(folder / CALIBRATION, {**_calibrations(folder), task: entry})
    return found.expected()


def _calibrated(
    model: EdgeModel, task: str, entry: Mapping[str, Any], more: Iterable[Record] = ()
) -> ConfidenceCalibrator:
    """The ConfidenceCalibrator of a task, fitted to the records of an entry and to `more`, by the slots' names."""
    chosen = model.task(task)
    if chosen.embeds or chosen.head:
        raise UsageError(f"{task} writes no answer that could be more or less sure: it is always given here.")
    source = _some(entry)
    view = SlotView.of(chosen, source, entry["columns"])
    states, confidences, right = [], [], []
    for seen in chain(map(view, source), more):
        answer = model.answer(task, chosen.asked(seen), truncate="start")
        assert answer.state is not None
        states.append(answer.state)
        confidences.append(answer.confidence)
        right.append(agreement(answer.value, _wanted(chosen.outputs, seen)))
    if len(states) < LEAST:
        raise UsageError(f"{entry['data']} has {len(states)} records; a calibration takes {LEAST} at least.")
    return ConfidenceCalibrator.fit(np.stack(states), np.array(confidences), np.array(right), entry["max_loss"])


def _some(entry: Mapping[str, Any]) -> Source:
    """The records of an entry, evenly spread over its source, the same every time."""
    source = open_source(entry["data"])
    chosen = np.random.default_rng(0).permutation(len(source))[: entry["records"]]
    return Source(entry["data"], ListRecords(source[int(number)] for number in sorted(chosen)))


def _wanted(outputs: Iterable[str], record: Mapping[str, Any]) -> Any:
    values = {name: record.get(name) for name in outputs}
    return values if len(values) > 1 else next(iter(values.values()))


def _save(sureness: ConfidenceCalibrator, package: Path, task: str) -> None:
    digest = about_of(package)["sha256"]
    write_file(package / f"sureness-{task}.npz", lambda draft: sureness.save(draft, digest))


def _calibrations(version: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((version / CALIBRATION).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise OpenM6Error(f"{version / CALIBRATION} is damaged: calibrate again.") from None
    return found


# Learning


def open_kept_source(name: str, limit: int | None) -> Source:
    """`kept:BOX/TASK/train` or `/held-out`, up to a row (`?until=`): what a box kept, by the slots of the task."""
    place, _, query = name.removeprefix("kept:").partition("?")
    until = int(query.removeprefix("until=")) if query.startswith("until=") else None
    folder, _, rest = place.rpartition("/")
    folder, _, task = folder.rpartition("/")
    if rest not in ("train", "held-out"):
        raise UsageError(f"{name}: write kept:BOX/TASK/train or kept:BOX/TASK/held-out.")
    found = _kept_records(Box(folder), task, until)
    return Source(name, found.held_out if rest == "held-out" else found.learned, limit=limit)


class _Kept(NamedTuple):
    """Kept answers to learn from, those that are held out, and how many are passed over, by the reason."""

    learned: ListRecords
    held_out: ListRecords
    passed_over: Counter[str]


def _kept_records(box: Box, task: str, until: int | None) -> _Kept:
    chosen = _task(box, task)
    eyes, view = image_encoder_id(box.folder() / "model"), SlotView(chosen, {name: name for name in chosen.inputs})
    calibration = _digests(chosen, _calibrations(box.folder()).get(task))
    sides: tuple[list[Record], list[Record]] = ([], [])
    passed_over: Counter[str] = Counter()
    with closing(open_answer_store(box.path, box.settings)) as kept:
        for row in kept.rows(task, until):
            record, held_out = row["record"], is_held_out(row)
            values = (row["value"] or {}) if len(chosen.outputs) > 1 else {chosen.outputs[0]: row["value"]}
            if any(isinstance(v, Mapping) and "features" in v and v.get("eyes") != eyes for v in record.values()):
                passed_over["of another image encoder"] += 1
            elif any((value := values.get(name)) is None or is_empty(value) for name in chosen.outputs):
                passed_over["without an answer"] += 1
            elif calibration and not held_out and digest(view, record, chosen.inputs) in calibration:
                passed_over["in the calibration"] += 1
            else:
                sides[held_out].append({**record, **values, "_where": f"kept:{task}#{row['id']}"})
    return _Kept(ListRecords(sides[0]), ListRecords(sides[1]), passed_over)


def _digests(task: Task, entry: Mapping[str, Any] | None) -> set[bytes]:
    """Digests of the inputs of a calibration's records."""
    if entry is None:
        return set()
    source = _some(entry)
    view = SlotView.of(task, source, entry["columns"])
    return {digest(view, record, task.inputs) for record in source}


def _task(box: Box, name: str) -> Task:
    """Raises UsageError where the box's model has no such task."""
    tasks = {task.name: task for task in read_card(box.folder() / "package")[0]}
    if name not in tasks:
        raise UsageError(f"{box.path} has no task {name}.{suggest(name, list(tasks))} It has: {', '.join(tasks)}.")
    return tasks[name]


def learn(
    path: Path,
    data: Mapping[str, list[str]] | None = None,
    steps: int = 400,
    batch_size: int = 48,
    learning_rate: float = 5e-4,
    seed: int = 0,
) -> dict[str, Any]:
    """One round. `data`: by task, sources that the model is not to forget meanwhile; without, it learns of the kept
    answers alone.

    Returns what was measured, and whether the version was promoted. A round that was killed goes on where it was, with
    what it began with. Raises UsageError where there is too little to learn of.
    """
    from filelock import FileLock, Timeout

    box = Box(path)
    if box.settings.privacy == NOTHING:
        raise UsageError("This box sends nothing, so nothing is there to learn of (privacy in box.toml).")
    if not (box.folder() / "model").is_dir():
        raise UsageError(
            f"{path} was copied without {VERSIONS}/{box.version}/model, which learns: put its kept.sqlite into the "
            "folder that has the model, and learn there."
        )
    try:
        with FileLock(box.path / "learning.lock", timeout=0):
            return _round(box, data or {}, steps, batch_size, learning_rate, seed)
    except Timeout:
        raise UsageError(f"{path} is learning already, in another process.") from None


def _round(
    box: Box, data: Mapping[str, list[str]], steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    folder = box.path / LEARNING
    plan = _plan(folder)
    if plan is None or plan["from"] != box.version:
        shutil.rmtree(folder, ignore_errors=True)
        plan = _begin(box, data, steps, batch_size, learning_rate, seed)
    model = _trained(box, plan, folder)
    version = folder / "version"
    if not version.is_dir():

        def write(draft: Path) -> None:
            shutil.copytree(model, draft / "model")
            export(draft / "model", draft / "package", about_of(box.folder() / "package")["bits"])

        write_whole(version, write)
    found = _measured(box, plan, version)
    if found["better"]:
        number = box.next_version()
        target = box.path / VERSIONS / number
        publish(version, target)
        box.use(number)
        found["version"] = number
        for old in box.versions[:-VERSIONS_KEPT]:
            shutil.rmtree(box.folder(old))
    shutil.rmtree(folder)
    return found


def _plan(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "plan.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _begin(
    box: Box, data: Mapping[str, list[str]], steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    entries = _calibrations(box.folder())
    for task, names in data.items():
        chosen = _task(box, task)
        if task in entries:
            check_apart(chosen, _some(entries[task]), entries[task]["columns"], names)
    with closing(open_answer_store(box.path, box.settings)) as kept:
        there = {task: last for task, (_, last) in kept.tasks().items()}
    kept_of = {task: _kept_records(box, task, last) for task, last in there.items()}
    usable = {task: len(one.learned) + len(one.held_out) for task, one in kept_of.items()}
    learned = {task: last for task, last in there.items() if usable[task] >= LEAST}
    if not learned:
        passed_over = sum((one.passed_over for one in kept_of.values()), Counter[str]())
        besides = f" (passed over: {told_counts(passed_over)})" if passed_over else ""
        raise UsageError(
            f"{box.path} has kept {sum(usable.values())} answers of the cloud{besides}; a round takes {LEAST} of a "
            "task at least."
        )
    plan = {
        "from": box.version, "until": learned, "data": {task: list(some) for task, some in data.items()},
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
    }  # fmt: skip
    folder = box.path / LEARNING
    folder.mkdir(exist_ok=True)
    write_json(folder / "plan.json", plan)
    return plan


def _trained(box: Box, plan: Mapping[str, Any], folder: Path) -> Path:
    from openm6.train.recipe import check_recipe
    from openm6.train.trainer import train

    run, model = folder / "run", box.folder() / "model"
    if (run / "model" / "config.json").is_file():
        return run / "model"
    sections: list[dict[str, Any]] = []
    for task, until in plan["until"].items():
        replayed = plan["data"].get(task, [])
        sections.append({"source": f"kept:{box.path}/{task}/train?until={until}", "task": task, "name": "kept"})
        sections += [{"source": one, "task": task, "weight": REPLAY / len(replayed)} for one in replayed]
    for task, replayed in plan["data"].items():  # in the plan's order: a round that goes on has the same recipe
        if task not in plan["until"]:
            sections += [{"source": one, "task": task, "weight": 0.5} for one in replayed]
    steps = plan["steps"]
    recipe = check_recipe({
        "name": "cascade learn", "seed": plan["seed"], "output": str(run), "model": {"path": str(model)},
        "data": sections,
        "train": {
            "steps": steps, "batch_size": plan["batch_size"], "row_length": read_card(model)[1],
            "optimizer": "muon", "learning_rate": plan["learning_rate"],
            "matrix_learning_rate": 2 * plan["learning_rate"], "warmup": max(1, steps // 20), "weight_decay": 0.01,
            "checkpoint_every": max(1, steps // 6), "workers": 0,
            # Features that were kept are of these eyes: with others they would mean something else.
            "freeze_image_encoder": box.settings.privacy == FEATURES,
        },
    })  # fmt: skip
    return train(recipe)


def _measured(box: Box, plan: Mapping[str, Any], version: Path) -> dict[str, Any]:
    """The comparison of the new version with the current one; also writes the new calibration."""
    old, new = EdgeModel(box.folder() / "package"), EdgeModel(version / "package")
    told: dict[str, Any] = {"from": plan["from"], "tasks": {}}
    entries = _calibrations(box.folder())
    before, after = [np.zeros(0)], [np.zeros(0)]
    held_out: dict[str, ListRecords] = {}
    for task, until in plan["until"].items():
        kept = _kept_records(box, task, until)
        some = held_out[task] = not_trained_on(old.task(task), kept.held_out, plan["data"].get(task, ()))
        if trained_on := len(kept.held_out) - len(some):
            kept.passed_over["held out, and in --data"] = trained_on
        before.append(_right(old, task, some))
        after.append(_right(new, task, some))
        told["tasks"][task] = {
            "learned": len(kept.learned), "held_out": len(some), "passed_over": dict(kept.passed_over),
            "held_out_before": _mean(before[-1]), "held_out_after": _mean(after[-1]),
        }  # fmt: skip
    for task, entry in entries.items():
        # With what came in and was held out of learning: there a threshold is needed.
        fitted = _calibrated(new, task, entry, iterate(held_out[task]) if task in held_out else ())
        _save(fitted, version / "package", task)
        source = _some(entry)
        known = ListRecords(map(SlotView.of(old.task(task), source, entry["columns"]), source))
        told["tasks"].setdefault(task, {}).update(
            before=_mean(_right(old, task, known)), after=_mean(fitted.parts["right"][: len(known)])
        )
    write_json(version / CALIBRATION, entries)
    told |= gain(np.concatenate(before), np.concatenate(after))
    told["reason"] = reason_against(told)
    return {**told, "better": not told["reason"]}


def _right(model: EdgeModel, task: str, records: ListRecords) -> np.ndarray:
    """Correctness of each answer, [n], 0 to 1."""
    chosen = model.task(task)
    found = [
        agreement(model.answer(task, chosen.asked(one), truncate="start").value, _wanted(chosen.outputs, one))
        for one in iterate(records)
    ]
    return np.array(found, float)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
