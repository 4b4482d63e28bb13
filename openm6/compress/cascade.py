"""Edge devices: creation from a model, calibration, and learning from the cloud's answers.

A round of learning is a training like any other (`openm6 train`), on the stored answers and on the data of the
calibration; an interrupted round is resumed. Its model is exported, and compared with the current version on the stored
answers that were held out of learning, and on the calibration records. Only a version that is significantly better is
promoted (promotion.py).

    learning/plan.json   what this round learns, fixed when it begins
    learning/run         the training
    learning/version     the new version; moved to versions/ when it is complete
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openm6.core.bases import base_of, require_model
from openm6.core.errors import OpenM6Error, UsageError, suggest
from openm6.core.files import lock_output, publish, require_new, write_file, write_json, write_whole
from openm6.data.columns import SlotView
from openm6.data.overlap import digest
from openm6.data.source import Source, open_source
from openm6.data.store import ListRecords, Record, iterate
from openm6.edge.answer_store import is_empty, is_held_out
from openm6.edge.calibration import ConfidenceCalibrator, agreement
from openm6.edge.device import FEATURES, FILE, IMAGE_ENCODER, NOTHING, VERSIONS, EdgeDevice, Settings, settings_toml
from openm6.edge.opening import open_answer_store
from openm6.edge.package import export, export_image_encoder, write_program
from openm6.edge.runner import EdgeModel, about_of
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


def create_device(
    path: Path, model: Path, settings: Settings, bits: int | None = 8, cloud_model: Path | None = None
) -> EdgeDevice:
    """Create an edge device from a model directory. `cloud_model`: the cloud's model, whose features are sent. Raises
    UsageError for an existing path, and for models that cannot be used."""
    require_new(path)
    check_whole(model)
    if settings.privacy == FEATURES and cloud_model is None:
        raise UsageError(
            "To send features the device needs the image encoder of the cloud's model: --cloud-model DIRECTORY."
        )
    for directory in filter(None, (model, cloud_model)):
        require_model(base_of(directory) or directory)

    def write(folder: Path) -> None:
        first = folder / VERSIONS / "0001"
        first.mkdir(parents=True)
        shutil.copytree(model, first / "model")
        export(model, first / "package", bits)
        if cloud_model is not None:
            export_image_encoder(cloud_model, folder / IMAGE_ENCODER)
        write_program(folder / "openm6-edge")
        (folder / FILE).write_text(settings_toml(settings), "utf-8")
        (folder / "current").write_text("0001\n", "utf-8")

    write_whole(path, write)
    return EdgeDevice(path)


def calibrate_task(
    device: EdgeDevice, task: str, data: str, columns: Mapping[str, str] | None = None, records: int = 500,
    max_loss: float = 0.004,
) -> dict[str, float]:  # fmt: skip
    """Fit a task's ConfidenceCalibrator to records with answers, and remember them for later versions.

    `max_loss`: largest fraction of all answers that are given locally and wrong. Returns the expected rates. Raises
    UsageError for a task that does not generate text.
    """
    if not 0 < max_loss < 1:
        raise UsageError(f"max_loss is {max_loss}: a fraction between 0 and 1.")
    entry = {"data": data, "columns": dict(columns or {}), "records": records, "max_loss": max_loss}
    folder = device.folder()
    found = _calibrate(EdgeModel(folder / "package"), task, entry)
    write_json(folder / CALIBRATION, {**_calibrations(folder), task: entry})
    return found.expected()


def _calibrate(
    model: EdgeModel, task: str, entry: Mapping[str, Any], more: Iterable[Record] = ()
) -> ConfidenceCalibrator:
    """Fit the ConfidenceCalibrator of a task to the records of an entry and to `more`, by slot, and save it."""
    chosen = model.task(task)
    if chosen.embeds or chosen.head:
        raise UsageError(f"{task} generates no text, so its answers have no confidence: they are always given locally.")
    source = _sample(entry)
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
    fitted = ConfidenceCalibrator.fit(np.stack(states), np.array(confidences), np.array(right), entry["max_loss"])
    write_file(model.path / f"calibration-{task}.npz", lambda draft: fitted.save(draft, model.about["sha256"]))
    return fitted


def _sample(entry: Mapping[str, Any]) -> Source:
    """The records of an entry, evenly spread over its source, the same every time."""
    source = open_source(entry["data"])
    chosen = np.random.default_rng(0).permutation(len(source))[: entry["records"]]
    return Source(entry["data"], ListRecords(source[int(number)] for number in sorted(chosen)))


def _wanted(outputs: Iterable[str], record: Mapping[str, Any]) -> Any:
    values = {name: record.get(name) for name in outputs}
    return values if len(values) > 1 else next(iter(values.values()))


def _calibrations(version: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((version / CALIBRATION).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise OpenM6Error(f"{version / CALIBRATION} is damaged: calibrate again.") from None
    return found


def open_kept_source(name: str, limit: int | None) -> Source:
    """Stored answers of an edge device, by slot: `kept:DEVICE/TASK/train` or `/held-out`, up to an id (`?until=`)."""
    place, _, query = name.removeprefix("kept:").partition("?")
    until = int(query.removeprefix("until=")) if query.startswith("until=") else None
    folder, _, rest = place.rpartition("/")
    folder, _, task = folder.rpartition("/")
    if rest not in ("train", "held-out"):
        raise UsageError(f"{name}: write kept:DEVICE/TASK/train or kept:DEVICE/TASK/held-out.")
    found = _stored_answers(EdgeDevice(folder), task, until)
    return Source(name, found.held_out if rest == "held-out" else found.learned, limit=limit)


class _Answers(NamedTuple):
    """Stored answers to learn from, held-out ones, and the number of skipped ones by reason."""

    learned: ListRecords
    held_out: ListRecords
    skipped: Counter[str]


def _stored_answers(device: EdgeDevice, task: str, until: int | None) -> _Answers:
    chosen = _task(device, task)
    encoder = image_encoder_id(device.folder() / "model")
    view = SlotView(chosen, {name: name for name in chosen.inputs})
    calibration: set[bytes] = set()  # digests of the inputs
    if entry := _calibrations(device.folder()).get(task):
        source = _sample(entry)
        calibrated = SlotView.of(chosen, source, entry["columns"])
        calibration = {digest(calibrated, record, chosen.inputs) for record in source}
    sides: tuple[list[Record], list[Record]] = ([], [])
    skipped: Counter[str] = Counter()
    with closing(open_answer_store(device.path, device.settings)) as kept:
        for row in kept.rows(task, until):
            record, held_out = row["record"], is_held_out(row)
            values = (row["value"] or {}) if len(chosen.outputs) > 1 else {chosen.outputs[0]: row["value"]}
            pictures = [v for v in record.values() if isinstance(v, Mapping) and "features" in v]
            if any(picture.get("image_encoder") != encoder for picture in pictures):
                skipped["of another image encoder"] += 1
            elif any((value := values.get(name)) is None or is_empty(value) for name in chosen.outputs):
                skipped["without an answer"] += 1
            elif not held_out and calibration and digest(view, record, chosen.inputs) in calibration:
                skipped["in the calibration"] += 1
            else:
                sides[held_out].append({**record, **values, "_where": f"kept:{task}#{row['id']}"})
    return _Answers(ListRecords(sides[0]), ListRecords(sides[1]), skipped)


def _task(device: EdgeDevice, name: str) -> Task:
    """Raises UsageError where the device's model has no such task."""
    tasks = {task.name: task for task in read_card(device.folder() / "package")[0]}
    if name not in tasks:
        raise UsageError(f"{device.path} has no task {name}.{suggest(name, list(tasks))} It has: {', '.join(tasks)}.")
    return tasks[name]


def learn(
    path: Path, data: Mapping[str, list[str]] | None = None, steps: int = 400, batch_size: int = 48,
    learning_rate: float = 5e-4, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Run a round of learning, or resume an interrupted one with its own settings. `data`: by task, sources to rehearse
    against forgetting; without them only the stored answers are learned.

    Returns the measurements, and whether the version was promoted. Raises UsageError without enough answers.
    """
    device = EdgeDevice(path)
    if device.settings.privacy == NOTHING:
        raise UsageError("This device sends nothing, so it has no answers to learn from (privacy in edge.toml).")
    if not (device.folder() / "model").is_dir():
        raise UsageError(
            f"{path} was copied without {VERSIONS}/{device.version}/model, which is trained: put its kept.sqlite into "
            "the folder that has the model, and learn there."
        )
    with lock_output(device.path / LEARNING):
        plan: dict[str, Any] | None = None
        with suppress(OSError, ValueError):
            plan = json.loads((device.path / LEARNING / "plan.json").read_text("utf-8"))
        if plan is None or plan["from"] != device.version:
            shutil.rmtree(device.path / LEARNING, ignore_errors=True)
            options = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
            plan = _begin(device, data or {}, options)
        return _round(device, plan)


def _round(device: EdgeDevice, plan: Mapping[str, Any]) -> dict[str, Any]:
    folder = device.path / LEARNING
    model, version = _trained(device, plan, folder), folder / "version"
    if not version.is_dir():

        def write(draft: Path) -> None:
            shutil.copytree(model, draft / "model")
            export(draft / "model", draft / "package", about_of(device.folder() / "package")["bits"])

        write_whole(version, write)
    found = _compare(device, plan, version)
    if found["better"]:
        found["version"] = f"{int(max(device.versions)) + 1:04}"
        publish(version, device.path / VERSIONS / found["version"])
        device.use(found["version"])
        for old in device.versions[:-VERSIONS_KEPT]:
            shutil.rmtree(device.folder(old))
    shutil.rmtree(folder)
    return found


def _begin(device: EdgeDevice, data: Mapping[str, list[str]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the plan of a new round. Raises UsageError without enough answers, or for data of the calibration."""
    entries = _calibrations(device.folder())
    for task, names in data.items():
        chosen = _task(device, task)
        if task in entries:
            check_apart(chosen, _sample(entries[task]), entries[task]["columns"], names)
    with closing(open_answer_store(device.path, device.settings)) as store:
        last_of = {task: last for task, (_, last) in store.tasks().items()}
    answers = {task: _stored_answers(device, task, last) for task, last in last_of.items()}
    usable = {task: len(some.learned) + len(some.held_out) for task, some in answers.items()}
    learned = {task: last for task, last in last_of.items() if usable[task] >= LEAST}
    if not learned:
        skipped = sum((some.skipped for some in answers.values()), Counter[str]())
        besides = f" (skipped: {told_counts(skipped)})" if skipped else ""
        raise UsageError(
            f"{device.path} has {sum(usable.values())} stored answers of the cloud{besides}; a round takes at least "
            f"{LEAST} of one task."
        )
    plan = {
        "from": device.version,
        "until": learned,
        "data": {task: list(some) for task, some in data.items()},
        **options,
    }
    folder = device.path / LEARNING
    folder.mkdir(exist_ok=True)
    write_json(folder / "plan.json", plan)
    return plan


def _trained(device: EdgeDevice, plan: Mapping[str, Any], folder: Path) -> Path:
    from openm6.train.recipe import check_recipe
    from openm6.train.trainer import train

    run, model = folder / "run", device.folder() / "model"
    if (run / "model" / "config.json").is_file():
        return run / "model"
    sections: list[dict[str, Any]] = []
    for task, until in plan["until"].items():
        replayed = plan["data"].get(task, [])
        sections.append({"source": f"kept:{device.path}/{task}/train?until={until}", "task": task, "name": "kept"})
        sections += [{"source": one, "task": task, "weight": REPLAY / len(replayed)} for one in replayed]
    for task, replayed in plan["data"].items():  # in the plan's order: a resumed round has the same recipe
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
            # Stored features are those of this image encoder.
            "freeze_image_encoder": device.settings.privacy == FEATURES,
        },
    })  # fmt: skip
    return train(recipe)


def _compare(device: EdgeDevice, plan: Mapping[str, Any], version: Path) -> dict[str, Any]:
    """The comparison of the new version with the current one; also writes the new calibration."""
    old, new = EdgeModel(device.folder() / "package"), EdgeModel(version / "package")
    found: dict[str, Any] = {"from": plan["from"], "tasks": {}}
    entries = _calibrations(device.folder())
    before, after = [np.zeros(0)], [np.zeros(0)]
    held_out: dict[str, ListRecords] = {}
    for task, until in plan["until"].items():
        answers = _stored_answers(device, task, until)
        some = held_out[task] = not_trained_on(old.task(task), answers.held_out, plan["data"].get(task, ()))
        if trained_on := len(answers.held_out) - len(some):
            answers.skipped["held out, and in --data"] = trained_on
        before.append(_right(old, task, some))
        after.append(_right(new, task, some))
        found["tasks"][task] = {
            "learned": len(answers.learned), "held_out": len(some), "skipped": dict(answers.skipped),
            "held_out_before": _mean(before[-1]), "held_out_after": _mean(after[-1]),
        }  # fmt: skip
    for task, entry in entries.items():
        # The held-out answers are new requests, for which the threshold is needed.
        fitted = _calibrate(new, task, entry, iterate(held_out[task]) if task in held_out else ())
        source = _sample(entry)
        known = ListRecords(map(SlotView.of(old.task(task), source, entry["columns"]), source))
        found["tasks"].setdefault(task, {}).update(
            before=_mean(_right(old, task, known)), after=_mean(fitted.parts["right"][: len(known)])
        )
    write_json(version / CALIBRATION, entries)
    found |= gain(np.concatenate(before), np.concatenate(after))
    found["reason"] = reason_against(found)
    return {**found, "better": not found["reason"]}


def _right(model: EdgeModel, task: str, records: ListRecords) -> np.ndarray:
    """Correctness of each answer, [n], 0 to 1."""
    chosen = model.task(task)
    pairs = ((model.answer(task, chosen.asked(one), truncate="start"), one) for one in iterate(records))
    return np.array([agreement(answer.value, _wanted(chosen.outputs, one)) for answer, one in pairs], float)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
