"""Pictures by the batch, and what people say of them: candidates for many prompts, the best kept, reviewed, learned.

batch.json         what was asked for
candidates.jsonl   one line a picture: file, what was asked, codes, estimates, score, rank among its prompt's
pictures/          NNNNNN-K.png, the prompt's number and the rank; NNNNNN-SLOT.png, a picture of the prompt
rejects.jsonl      prompts that could not be used
review.html        the pictures, each with two buttons; gives labels.jsonl
labelled.jsonl     the pictures that people judged, as a source to train on
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
from openm6.data.source import Source, open_source
from openm6.data.store import Record
from openm6.inference.draw import Drawing
from openm6.inference.rank import fresh_seed
from openm6.inference.session import Session
from openm6.studio.review import (
    CANDIDATES,
    CONTENT,
    LABELLED,
    REJECTS,
    SETTINGS,
    acceptance,
    as_line,
    batch_folder,
    content_of,
    go_on,
    groups,
    kept_of,
    no_progress,
    open_rejects,
    require_same,
    rows_of,
    seed_of,
    settings_of,
    usable,
    verdicts_on,
    write,
    write_review,
)
from openm6.tasks.task import Task

ROWS = 64
"""Pictures that are drawn at once."""

ALIKE = 5.0
"""Mean difference of two pictures at 8 x 8 pixels, in levels of 255, below which they count as the same. Of the demo's
studio, noise of 8 levels makes 2.3 at most, a shift by 2 of 64 pixels 3.4 (the median); of 87,000 pairs of pictures of
one kind the nearest are 4.9 apart, a thousandth less than 9.6. By a difference hash noise alone flips up to 22 of its
64 bits, since grounds are flat, and different pictures of one kind differ in as few as 1."""


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
    on_progress: Callable[[int, int], None] = no_progress,
) -> dict[str, Any]:
    """For every record of the source `prompts` draw `candidates`, keep the `keep` best (by default 4, or all of fewer
    candidates) that are not alike, and write `output` with a page to review them. Called again after a kill it goes on
    after the last whole prompt, to the same pictures; without `resume` what is there already is refused.

    Without `decoding["seed"]` a fresh seed is drawn once for the batch. `columns` maps slots to columns where names
    differ. `truncate`: see Session.run; without it a prompt that is too long is left out.

    Returns {"prompts": drawn, "bad": left out, "uncertain": whose best picture is (see Candidate), "pictures": kept,
    "seed", "page": path}. Raises DataError when more than a twentieth of the prompts, and 20, cannot be used;
    UsageError for a folder that was begun with other prompts, another model or options, or that another process is
    writing.
    """
    chosen, source = session.task(task), open_source(prompts, data_format)
    chosen.check_draws()
    keep, decoding = kept_of(keep, candidates, 4), dict(decoding or {})
    if "seed" not in {**chosen.decode, **decoding}:
        decoding["seed"] = settings_of(output)["seed"] if (output / SETTINGS).is_file() else fresh_seed()
    list(session.draw_many(chosen, [], candidates=candidates, decoding=decoding))  # refuses what cannot be asked for
    options = Drawing.of(**{**chosen.decode, **decoding})
    view = _wishing(chosen, source, columns or {})
    settings = {
        "model": str(session.path.resolve()) if session.path else "", "task": chosen.name, "prompts": str(prompts),
        CONTENT: content_of(session, source), "columns": dict(view.mapping), "candidates": candidates, "keep": keep,
        "truncate": truncate, **asdict(options),
    }  # fmt: skip
    slots = {name: chosen.slots[name].type for name in chosen.inputs}

    def asks(record: Record) -> dict[str, Any]:
        return _without_pictures(chosen, _wish(view, record))

    with batch_folder(output, settings, {"slots": slots, "picture": chosen.outputs[0]}, resume, "pictures"):
        begun = go_on(output / CANDIDATES)
        require_same(
            output, settings, source, {n: _without_pictures(chosen, row["asked"]) for n, row in begun.items()}, asks
        )
        done, pictures = set(begun), sum(row["of"] for row in begun.values())
        rejects = open_rejects(output / REJECTS, source)
        with open(output / CANDIDATES, "a", encoding="utf-8") as file:
            for group in groups(len(source), max(1, ROWS // candidates)):
                wishes = dict(usable(session, chosen, partial(_wish, view), source, group, rejects, truncate=truncate))
                if not done.issuperset(wishes):
                    # A group is drawn whole, with a seed of its own: its pictures do not depend on a kill.
                    own = {**decoding, "seed": seed_of(options.seed, group.start)}
                    drawn = session.draw_many(
                        chosen, wishes.values(), candidates=candidates, batch_size=ROWS, decoding=own, truncate=truncate
                    )
                    for number, some in zip(wishes, drawn, strict=True):
                        if number not in done:
                            lines = _save(output, chosen, number, wishes[number], distinct(some, keep))
                            file.writelines(lines)
                            sync(file)
                            done.add(number)
                            pictures += len(lines)
                on_progress(group.stop, len(source))
        page = write_review(output)
    uncertain = sum(row["rank"] == 1 and row["uncertain"] for row in rows_of(output))
    return {
        "prompts": len(done), "bad": rejects.bad, "uncertain": uncertain, "pictures": pictures, "seed": options.seed,
        "page": str(page),
    }  # fmt: skip


def distinct(candidates: Iterable[Candidate], keep: int) -> list[Candidate]:
    """The first `keep`, the best ones, that do not look like one before them."""
    kept: list[Candidate] = []
    seen: list[np.ndarray] = []
    for candidate in candidates:
        small = np.asarray(candidate.image.resize((8, 8), Image.Resampling.BOX), np.float32)
        if len(kept) < keep and all(np.abs(small - other).mean() >= ALIKE for other in seen):
            kept.append(candidate)
            seen.append(small)
    return kept


def read_labels(output: Path, labels: str | Path) -> Iterator[dict[str, Any]]:
    """The pictures of a batch that people judged, as records to train its task on: the slots asked for, the picture's
    codes, and `verdict_quality`, 1 or 0.

    `labels` are JSON lines, {"file": "pictures/000001-1.png", "accepted": true}. Raises DataError for one of a picture
    that the batch has not, one that is neither true nor false, and for two different ones of a picture.
    """
    return (record for _, record in _judged(output, labels))


def write_labelled(output: Path, labels: str | Path) -> dict[str, Any]:
    """Write what `read_labels` gives as `output/labelled.jsonl`. Returns {"file": path, "labelled": number, "accepted":
    share, "by_rank": {rank: {"labelled": number, "accepted": share}}}."""
    verdicts: dict[int, list[int]] = {}

    def lines() -> Iterator[str]:
        for rank, record in _judged(output, labels):
            verdicts.setdefault(rank, []).append(record["verdict_quality"])
            yield as_line(record)

    file = write(output / LABELLED, lines())
    return {"file": str(file), **acceptance(verdicts)}


def _wishing(task: Task, source: Source, columns: Mapping[str, str]) -> SlotView:
    """The view of prompts for the slots on the task's left alone: there is no picture yet."""
    view = SlotView.of(task.left(), source, columns)
    if not view.mapping:
        raise UsageError(
            f"None of the columns of {source.name} ({', '.join(source.columns)}) is taken for a slot of {task.name} "
            f"({', '.join(task.inputs)}): say which, by {task.inputs[0] if task.inputs else 'SLOT'}=COLUMN."
        )
    return view


def _wish(view: SlotView, record: Record) -> dict[str, Any]:
    """What a prompt asks for, by slot."""
    seen = view(record)
    wish = {name: seen[name] for name in view.mapping if not _is_blank(seen.get(name))}
    if not wish:
        where = record.get("_where", "a prompt")
        raise DataError(f"{where} asks for nothing: {', '.join(view.mapping.values())} is empty.")
    return wish


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _without_pictures(task: Task, asked: Record) -> dict[str, Any]:
    """The slots of a prompt that are no pictures."""
    return {name: value for name, value in asked.items() if task.slots[name].type != "image"}


def _save(output: Path, task: Task, number: int, wish: Record, kept: list[Candidate]) -> list[str]:
    """Write the pictures of a prompt; returns their lines. The last one is known by its rank: a prompt is whole."""
    asked = dict(wish)
    for name in wish:
        if task.slots[name].type == "image":
            asked[name] = f"pictures/{number:06d}-{name}.png"
            _save_picture(open_image(wish[name]), output / asked[name])
    lines = []
    for rank, candidate in enumerate(kept, start=1):
        file = f"pictures/{number:06d}-{rank}.png"
        _save_picture(candidate.image, output / file)
        line = {
            "file": file, "prompt": number, "rank": rank, "of": len(kept), "asked": asked, "seed": candidate.seed,
            "uncertain": candidate.uncertain, "score": candidate.score, "estimates": candidate.estimates,
            "codes": candidate.codes.tolist(),
        }  # fmt: skip
        lines.append(as_line(line))
    return lines


def _save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture to the disk, which has to be done before the line that names it is written."""
    write_file(file, lambda draft: save(picture, draft, "PNG"))


def _judged(output: Path, labels: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rank, record to train on) of every picture with a verdict."""
    settings = settings_of(output, "pictures")
    verdicts = verdicts_on({row["file"] for row in rows_of(output)}, output, "picture", labels)
    for row in rows_of(output):
        if row["file"] in verdicts:
            # Slots that were not asked for are named too: no other column is then taken for them.
            asked = {slot: row["asked"].get(slot) for slot in settings["slots"]}
            verdict = int(verdicts[row["file"]].accepted)
            yield row["rank"], {**asked, settings["picture"]: row["codes"], "verdict_quality": verdict}
