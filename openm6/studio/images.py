"""Batches of generated pictures: several candidates per prompt, the best kept, then reviewed by people.

batch.json         settings
candidates.jsonl   one line per picture: file, prompt, codes, estimates, score, rank within its prompt
pictures/          NNNNNN-K.png, the prompt's number and the rank; NNNNNN-SLOT.png, an input picture of the prompt
rejects.jsonl      prompts that could not be used
review.html        the page to review the pictures; it downloads labels.jsonl
labelled.jsonl     the labelled pictures, as training data
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, UsageError
from openm6.core.files import sync, write_file
from openm6.core.images import open_image, save
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.data.store import Record
from openm6.inference.draw import Drawing
from openm6.inference.rank import fresh_seed
from openm6.inference.session import Session
from openm6.studio import review
from openm6.tasks.task import Task

ROWS = 64
"""Number of pictures per batch of decoding."""

ALIKE = 5.0
"""Mean absolute difference of two pictures at 8 x 8 pixels, in levels of 255, below which they are near-duplicates. On
the demo's studio pictures noise of 8 levels gives at most 2.3 and a shift by 2 of 64 pixels 3.4 (median); of 87,000
pairs of different pictures of one item the closest differ by 4.9, and 0.1% by less than 9.6. Perceptual hashes do not
separate the two on flat backgrounds (docs/design.md)."""


def make_batch(
    session: Session,
    task: str | Task,
    prompts: str | Path,
    output: Path,
    *,
    candidates: int = 8,
    keep: int | None = None,
    columns: Mapping[str, str] | None = None,
    decoding: Mapping[str, Any] | None = None,
    resume: bool = True,
    data_format: str | None = None,
    truncate: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Draw `candidates` pictures for every record of the source `prompts`, keep the `keep` best (by default 4, at most
    `candidates`) that are not near-duplicates, and write `output` with a review page. An interrupted batch is resumed
    after the last complete prompt, with the same pictures; without `resume` an existing folder is refused.

    Without `decoding["seed"]` one seed is drawn for the batch. `columns` maps slots to columns if names differ.
    `truncate`: see Session.run; without it a prompt that is too long is rejected. `on_progress` gets the number of
    finished and of all prompts.

    Returns {"prompts": number drawn, "bad": number rejected, "uncertain": prompts whose best picture is uncertain (see
    Candidate), "pictures": number kept, "seed", "page": path}. Raises DataError if more than 5% of the prompts, and
    more than 20, are rejected; UsageError for a folder that was started with other prompts, another model or options,
    or that another process is writing.
    """
    chosen, source = session.task(task), open_source(prompts, data_format)
    chosen.check_draws()
    keep, decoding = review.kept_of(keep, candidates, 4), dict(decoding or {})
    if "seed" not in {**chosen.decode, **decoding}:
        decoding["seed"] = review.settings_of(output)["seed"] if (output / review.SETTINGS).is_file() else fresh_seed()
    list(session.draw_many(chosen, [], candidates=candidates, decoding=decoding))  # raises for invalid options
    options = Drawing.of(**{**chosen.decode, **decoding})
    view = SlotView.of(chosen.without_target(), source, columns or {})
    if not view.mapping:
        raise UsageError(
            f"None of the columns of {source.name} ({', '.join(source.columns)}) matches an input slot of "
            f"{chosen.name} ({', '.join(chosen.inputs)}): map one by {next(iter(chosen.inputs), 'SLOT')}=COLUMN."
        )
    settings = {
        "model": str(session.path.resolve()) if session.path else "", "task": chosen.name, "prompts": str(prompts),
        review.CONTENT: review.content_of(session, source), "columns": dict(view.mapping),
        "candidates": candidates, "keep": keep, "truncate": truncate, **asdict(options),
    }  # fmt: skip
    slots = {name: chosen.slots[name].type for name in chosen.inputs}

    def asks(record: Record) -> dict[str, Any]:
        return _without_pictures(chosen, _inputs_of(view, record))

    with review.batch_folder(output, settings, {"slots": slots, "picture": chosen.outputs[0]}, resume, "pictures"):
        begun = review.go_on(output / review.CANDIDATES)
        before = {number: _without_pictures(chosen, row["asked"]) for number, row in begun.items()}
        review.require_same(output, settings, source, before, asks)
        done, pictures = set(begun), sum(row["of"] for row in begun.values())
        rejects = review.open_rejects(output / review.REJECTS, source)
        with open(output / review.CANDIDATES, "a", encoding="utf-8") as file:
            for group in review.groups(len(source), max(1, ROWS // candidates)):
                inputs = partial(_inputs_of, view)
                asked = dict(
                    review.usable(session, chosen, inputs, source, group, rejects, decoding=decoding, truncate=truncate)
                )
                if not done.issuperset(asked):
                    # A group is drawn whole with its own seed, so that its pictures do not depend on interruptions.
                    own = {**decoding, "seed": review.seed_of(options.seed, group.start)}
                    drawn = session.draw_many(
                        chosen, asked.values(), candidates=candidates, batch_size=ROWS, decoding=own, truncate=truncate
                    )
                    for number, some in zip(asked, drawn, strict=True):
                        if number not in done:
                            lines = _save(output, chosen, number, asked[number], distinct(some, keep))
                            file.writelines(lines)
                            sync(file)
                            done.add(number)
                            pictures += len(lines)
                on_progress(group.stop, len(source))
        page = review.write_review(output)
    uncertain = sum(row["rank"] == 1 and row["uncertain"] for row in review.rows_of(output))
    return {
        "prompts": len(done), "bad": rejects.bad, "uncertain": uncertain, "pictures": pictures, "seed": options.seed,
        "page": str(page),
    }  # fmt: skip


def distinct(candidates: Iterable[Candidate], keep: int) -> list[Candidate]:
    """The first `keep` candidates that are not near-duplicates of an earlier one."""
    kept: list[Candidate] = []
    seen: list[np.ndarray] = []
    for candidate in candidates:
        small = np.asarray(candidate.image.resize((8, 8), Image.Resampling.BOX), np.float32)
        if len(kept) < keep and all(np.abs(small - other).mean() >= ALIKE for other in seen):
            kept.append(candidate)
            seen.append(small)
    return kept


def read_labels(output: Path, labels: str | Path) -> Iterator[dict[str, Any]]:
    """The labelled pictures of a batch as training records of its task: the input slots, the picture's codes, and
    `verdict_quality`, 1 or 0.

    `labels`: JSON lines, {"file": "pictures/000001-1.png", "accepted": true}. Raises DataError for a label of a picture
    outside the batch, one that is neither true nor false, and two different labels of a picture.
    """
    return (record for _, record in _judged(output, labels))


def write_labelled(output: Path, labels: str | Path) -> dict[str, Any]:
    """Write the records of `read_labels` to `output/labelled.jsonl`. Returns: see `review.write_labels`."""
    judged = _judged(output, labels)
    return review.write_labels(output, ((rank, bool(one["verdict_quality"]), one) for rank, one in judged))


def _inputs_of(view: SlotView, record: Record) -> dict[str, Any]:
    """The inputs of a prompt by slot."""
    seen = view(record)
    inputs = {name: seen[name] for name in view.mapping if not _is_blank(seen.get(name))}
    if not inputs:
        where = record.get("_where", "a prompt")
        raise DataError(f"{where} is an empty prompt: {', '.join(view.mapping.values())} is empty.")
    return inputs


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _without_pictures(task: Task, asked: Record) -> dict[str, Any]:
    """The inputs of a prompt without pictures."""
    return {name: value for name, value in asked.items() if task.slots[name].type != "image"}


def _save(output: Path, task: Task, number: int, inputs: Record, kept: list[Candidate]) -> list[str]:
    """Write the pictures of a prompt. Returns their lines; the last rank marks the prompt as complete."""
    asked = dict(inputs)
    for name in inputs:
        if task.slots[name].type == "image":
            asked[name] = f"pictures/{number:06d}-{name}.png"
            _save_picture(open_image(inputs[name]), output / asked[name])
    lines = []
    for rank, candidate in enumerate(kept, start=1):
        file = f"pictures/{number:06d}-{rank}.png"
        _save_picture(candidate.image, output / file)
        line = {
            "file": file, "prompt": number, "rank": rank, "of": len(kept), "asked": asked, "seed": candidate.seed,
            "uncertain": candidate.uncertain, "score": candidate.score, "estimates": candidate.estimates,
            "codes": candidate.codes.tolist(),
        }  # fmt: skip
        lines.append(review.as_line(line))
    return lines


def _save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture durably, before the line that names it."""
    write_file(file, lambda draft: save(picture, draft, "PNG"))


def _judged(output: Path, labels: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rank, training record) of every labelled picture."""
    settings = review.settings_of(output, "pictures")
    verdicts = review.verdicts_on({row["file"] for row in review.rows_of(output)}, output, "picture", labels)
    for row in review.rows_of(output):
        if row["file"] in verdicts:
            # All slots are named, so that no other column is mapped to an empty one.
            asked = {slot: row["asked"].get(slot) for slot in settings["slots"]}
            verdict = int(verdicts[row["file"]].accepted)
            yield row["rank"], {**asked, settings["picture"]: row["codes"], "verdict_quality": verdict}
