"""Pictures by the batch, and what people say of them: candidates for many prompts, the best kept, reviewed, learned.

batch.json         what was asked for
candidates.jsonl   one line a picture: file, what was asked, codes, estimates, score, rank among its prompt's
pictures/          NNNNNN-K.png, the prompt's number and the rank; NNNNNN-SLOT.png, a picture of the prompt
rejects.jsonl      prompts that could not be used
review.html        the pictures, each with two buttons; gives labels.jsonl
labelled.jsonl     the pictures that people judged, as a source to train on
"""

from __future__ import annotations

import html
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openm6.atomic import require_new, write_failed, write_whole
from openm6.bundle import Bundle, Painting, Record
from openm6.data.columns import SlotView
from openm6.data.rejects import Reject, Rejects
from openm6.data.source import Source, open_source
from openm6.data.tables import read_jsonl
from openm6.decode.draw import Drawing
from openm6.errors import DataError, UsageError
from openm6.images import open_image
from openm6.tasks.task import Task

SETTINGS, CANDIDATES, REJECTS, PAGE, LABELLED = (
    "batch.json", "candidates.jsonl", "rejects.jsonl", "review.html", "labelled.jsonl",
)  # fmt: skip

ROWS = 64
"""Pictures that are drawn at once."""

ALIKE = 5.0
"""Mean difference of two pictures at 8 x 8 pixels, in levels of 255, below which they count as the same. Of the demo's
studio, noise of 8 levels makes 2.3 at most, a shift by 2 of 64 pixels 3.4 (the median); of 87,000 pairs of pictures of
one kind the nearest are 4.9 apart, a thousandth less than 9.6. By a difference hash noise alone flips up to 22 of its
64 bits, since grounds are flat, and different pictures of one kind differ in as few as 1."""


def make_batch(
    bundle: Bundle,
    task: str | Task,
    prompts: str | Path,
    output: Path,
    *,
    candidates: int = 8,
    keep: int = 4,
    columns: Mapping[str, str] | None = None,
    decoding: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """For every record of the source `prompts` draw `candidates`, keep the `keep` best that are not alike, and write
    `output` with a page to review them. Called again after a kill it goes on after the last whole prompt, to the same
    pictures; without `resume` what is there already is refused.

    `columns` maps slots to columns where names differ. Returns {"prompts": drawn, "bad": left out, "pictures": kept,
    "page": path}. Raises DataError when more than a twentieth of the prompts, and 20, cannot be used.
    """
    chosen, source = bundle.task(task), open_source(prompts)
    if not chosen.draws:
        raise UsageError(f"The task {chosen.name} does not draw.")
    if not 1 <= keep <= candidates:
        raise UsageError(f"keep is {keep}; it can be 1 to the number of candidates, {candidates}.")
    list(bundle.draw_many(chosen, [], candidates=candidates, decoding=decoding))  # refuses what cannot be asked for
    options = Drawing.of(**{**chosen.decode, **(decoding or {})})
    view = _wishing(chosen, source, columns or {})
    settings = {
        "model": str(bundle.path.resolve()) if bundle.path else "", "task": chosen.name, "prompts": str(prompts),
        "records": len(source), "columns": dict(view.mapping), "candidates": candidates, "keep": keep,
        **asdict(options),
    }  # fmt: skip
    slots = {name: chosen.slots[name].type for name in chosen.inputs}
    _begin(output, settings, {"slots": slots, "picture": chosen.outputs[0]}, resume)
    try:
        done, pictures = _go_on(output / CANDIDATES)
        rejects = _rejects(output / REJECTS, source)
        with open(output / CANDIDATES, "a", encoding="utf-8") as file, _progress() as bar:
            row = bar.add_task("prompts", total=len(source))
            for group in _groups(len(source), max(1, ROWS // candidates)):
                wishes = dict(_wishes(bundle, chosen, view, source, group, rejects))
                if not done.issuperset(wishes):
                    # A group is drawn whole, with a seed of its own: its pictures do not depend on a kill.
                    own = {**(decoding or {}), "seed": _seed(options.seed, group.start)}
                    drawn = bundle.draw_many(
                        chosen, wishes.values(), candidates=candidates, batch_size=ROWS, decoding=own
                    )
                    for number, some in zip(wishes, drawn, strict=True):
                        if number not in done:
                            lines = _save(output, chosen, number, wishes[number], distinct(some, keep))
                            file.writelines(lines)
                            file.flush()
                            done.add(number)
                            pictures += len(lines)
                bar.update(row, completed=group.stop)
        page = write_review(output)
    except OSError as error:
        raise write_failed(output, error) from None
    return {"prompts": len(done), "bad": rejects.bad, "pictures": pictures, "page": str(page)}


def distinct(paintings: Iterable[Painting], keep: int) -> list[Painting]:
    """The first `keep`, the best ones, that do not look like one before them."""
    kept: list[Painting] = []
    seen: list[np.ndarray] = []
    for painting in paintings:
        small = np.asarray(painting.image.resize((8, 8), Image.Resampling.BOX), np.float32)
        if len(kept) < keep and all(np.abs(small - other).mean() >= ALIKE for other in seen):
            kept.append(painting)
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
            yield _line(record)

    file = _write(output / LABELLED, lines())
    by_rank = {r: {"labelled": len(v), "accepted": sum(v) / len(v)} for r, v in sorted(verdicts.items())}
    every = [verdict for some in verdicts.values() for verdict in some]
    return {"file": str(file), "labelled": len(every), "accepted": sum(every) / len(every), "by_rank": by_rank}


def write_review(output: Path) -> Path:
    """Write the page on which people accept or reject the pictures of a batch; their verdicts stay in the browser until
    they are downloaded as labels.jsonl."""
    settings = _settings(output)
    pictures = []
    for row in _rows(output):
        asked: dict[bool, list[str]] = {True: [], False: []}  # pictures, and the rest
        for slot, value in row["asked"].items():
            asked[settings["slots"].get(slot) == "image"].append(str(value))
        pictures.append({"file": row["file"], "text": " · ".join(asked[False]), "given": asked[True]})
    data = json.dumps({"id": settings["id"], "pictures": pictures}, ensure_ascii=False)
    page = Path(__file__).with_name("review.html").read_text("utf-8")
    # A text that holds </script> must not end the script.
    page = page.replace("@TITLE@", html.escape(output.resolve().name)).replace("@DATA@", data.replace("<", "\\u003c"))
    return _write(output / PAGE, [page])


def _wishing(task: Task, source: Source, columns: Mapping[str, str]) -> SlotView:
    """The view of prompts for the slots on the task's left alone: there is no picture yet."""
    left = replace(task, instructions=tuple(replace(i, target=()) for i in task.instructions))
    view = SlotView.of(left, source, columns)
    if not view.mapping:
        raise UsageError(
            f"None of the columns of {source.name} ({', '.join(source.columns)}) is taken for a slot of {task.name} "
            f"({', '.join(task.inputs)}): say which, by {task.inputs[0] if task.inputs else 'SLOT'}=COLUMN."
        )
    return view


def _groups(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _seed(seed: int, start: int) -> int:
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, start]).generate_state(1)[0])


def _wishes(
    bundle: Bundle, task: Task, view: SlotView, source: Source, numbers: Iterable[int], rejects: Rejects
) -> Iterator[tuple[int, Record]]:
    """The prompts of these numbers that can be used, by slot; the others are counted."""
    for number in numbers:
        record = source[number]
        where = str(record.get("_where", f"{source.name}#{number}"))
        try:
            seen = view(record)
            wish = {name: seen[name] for name in view.mapping if seen.get(name) not in (None, "")}
            if not wish:
                raise DataError(f"{where} asks for nothing: {', '.join(view.mapping.values())} is empty.")
            bundle.prompt(task, wish)
        except DataError as error:
            rejects.count(where, str(error), source.name)
        else:
            yield number, wish


def _save(output: Path, task: Task, number: int, wish: Record, kept: list[Painting]) -> list[str]:
    """Write the pictures of a prompt; returns their lines. The last one is known by its rank: a prompt is whole."""
    asked = dict(wish)
    for name in wish:
        if task.slots[name].type == "image":
            asked[name] = f"pictures/{number:06d}-{name}.png"
            open_image(wish[name]).save(output / asked[name])
    lines = []
    for rank, painting in enumerate(kept, start=1):
        file = f"pictures/{number:06d}-{rank}.png"
        painting.image.save(output / file)
        line = {
            "file": file, "prompt": number, "rank": rank, "of": len(kept), "asked": asked, "score": painting.score,
            "estimates": painting.estimates, "codes": painting.codes.tolist(),
        }  # fmt: skip
        lines.append(_line(line))
    return lines


def _begin(output: Path, settings: dict[str, Any], more: dict[str, Any], resume: bool) -> None:
    """Make the folder of a new batch, or see that the one there was begun with the same settings."""
    if not (resume and (output / SETTINGS).is_file()):
        require_new(output)
        content = {**settings, **more, "id": uuid.uuid4().hex}

        def fill(folder: Path) -> None:
            (folder / "pictures").mkdir()
            (folder / SETTINGS).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")

        write_whole(output, fill)
        return
    before = _settings(output)
    for key, now in settings.items():
        if before.get(key) != now:
            raise UsageError(
                f"{output} was begun with {key} {before.get(key)}, not {now}: name another directory to begin anew."
            )


def _settings(output: Path) -> dict[str, Any]:
    try:
        content = json.loads((output / SETTINGS).read_text("utf-8"))
        return {**content, "id": str(content["id"]), "slots": dict(content["slots"]), "picture": content["picture"]}
    except OSError:
        raise UsageError(f"{output} is no batch: it has no {SETTINGS}. `openm6 images batch` makes one.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{output / SETTINGS} is damaged: make the batch again.") from None


def _go_on(path: Path) -> tuple[set[int], int]:
    """The prompts that are whole, and their pictures' number. What follows the last of them, torn by a kill, is cut."""
    done: set[int] = set()
    place = end = pictures = 0
    with open(path, "a+b") as file:
        file.seek(0)
        for line in file:
            try:
                row = json.loads(line)
                number, rank, of = row["prompt"], row["rank"], row["of"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            place += len(line)
            if rank == of:
                done.add(number)
                end, pictures = place, pictures + of
        file.truncate(end)
    return done, pictures


def _rejects(path: Path, source: Source) -> Rejects:
    """Counted anew by every call, those of the reading of the source too."""
    path.unlink(missing_ok=True)
    rejects = Rejects(path)
    rejects.saw(len(source))
    for reject in source.rejected:
        rejects.count(reject.where, reject.reason, source.name)
    return rejects


def _judged(output: Path, labels: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rank, record to train on) of every picture with a verdict."""
    settings, verdicts = _settings(output), _verdicts(labels)
    known = {row["file"] for row in _rows(output)}
    for file, (_, where) in verdicts.items():
        if file not in known:
            raise DataError(f"{where}: the batch {output} has no picture {file[:80]!r}; are these its labels?")
    for row in _rows(output):
        if row["file"] in verdicts:
            # Slots that were not asked for are named too: no other column is then taken for them.
            asked = {slot: row["asked"].get(slot) for slot in settings["slots"]}
            verdict = int(verdicts[row["file"]][0])
            yield row["rank"], {**asked, settings["picture"]: row["codes"], "verdict_quality": verdict}


def _verdicts(labels: str | Path) -> dict[str, tuple[bool, str]]:
    """By picture: the verdict, and where it stands."""
    found: dict[str, tuple[bool, str]] = {}
    for row in read_jsonl(str(labels), None, _refuse):
        where, file, accepted = row["_where"], row.get("file"), row.get("accepted")
        if not isinstance(file, str):
            raise DataError(f'{where} names no picture: a line has to be {{"file": ..., "accepted": true or false}}.')
        if not isinstance(accepted, bool):
            raise DataError(f"{where}: accepted is {str(accepted)[:40]!r}; a verdict is true or false.")
        before, there = found.setdefault(file, (accepted, where))
        if before != accepted:
            words = ("rejected", "accepted")
            raise DataError(
                f"{where}: {file} is {words[accepted]} here, and {words[before]} in {there}: keep one line."
            )
    if not found:
        raise DataError(f"{labels} holds no label.")
    return found


def _refuse(reject: Reject) -> None:
    raise DataError(reject.reason)


def _rows(output: Path) -> Iterator[dict[str, Any]]:
    return read_jsonl(str(output / CANDIDATES), None, _refuse)


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _write(path: Path, parts: Iterable[str]) -> Path:
    """A file that appears whole."""
    draft = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.writelines(parts)
        draft.replace(path)
    except OSError as error:
        raise write_failed(path, error) from None
    finally:
        draft.unlink(missing_ok=True)
    return path


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
