"""What batches of pictures and of texts share: a folder that goes on after a kill, a page to review, people's verdicts.

candidates.jsonl has a line for each candidate: the name by which it is judged, the number of its prompt, its rank among
the kept ones of that prompt, and how many those are.
"""

from __future__ import annotations

import html
import json
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openm6.atomic import cut_torn_line, require_new, whole_lines, write_failed, write_file, write_whole
from openm6.bundle import Bundle
from openm6.data.rejects import Reject, Rejects
from openm6.data.source import Source
from openm6.data.store import Record
from openm6.data.tables import read_jsonl
from openm6.errors import DataError, UsageError, cut
from openm6.json_lines import dumps
from openm6.tasks.task import Task

SETTINGS, CANDIDATES, REJECTS, PAGE, LABELLED = (
    "batch.json", "candidates.jsonl", "rejects.jsonl", "review.html", "labelled.jsonl",
)  # fmt: skip


def groups(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def seed_of(seed: int, start: int) -> int:
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, start]).generate_state(1)[0])


def check_keep(keep: int, candidates: int) -> None:
    if not 1 <= keep <= candidates:
        raise UsageError(f"keep is {keep}; it can be 1 to the number of candidates, {candidates}.")


def usable(
    bundle: Bundle,
    task: Task,
    ask: Callable[[Record], dict[str, Any]],
    source: Source,
    numbers: Iterable[int],
    rejects: Rejects,
    explain: Callable[[DataError, str, Record], str] = lambda error, where, record: str(error),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What is asked for by the records of these numbers, by slot, where it can be used; the others are counted, with
    the reason that `explain` gives. `ask` makes it of a record; it may raise DataError."""
    for number in numbers:
        record = source[number]
        try:
            asked = ask(record)
            bundle.prompt(task, asked)
        except DataError as error:
            where = place_of(source, number, record)
            rejects.count(where, explain(error, where, record), source.name)
        else:
            yield number, asked


def place_of(source: Source, number: int, record: Record) -> str:
    return str(record.get("_where", f"{source.name}#{number}"))


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], source: Source, number: int, output: Path) -> None:
    """Refuse to go on with a batch one of whose records has changed since its candidates were made."""
    if dumps(before) != dumps(now):
        where = place_of(source, number, source[number])
        raise UsageError(f"{where} has changed since {output} was begun: name another directory to begin anew.")


def acceptance(verdicts: Mapping[int, list[int]]) -> dict[str, Any]:
    """Of verdicts, 1 or 0, by rank: {"labelled": number, "accepted": share, "by_rank": {rank: the same two}}."""

    def told(some: list[int]) -> dict[str, Any]:
        return {"labelled": len(some), "accepted": sum(some) / len(some)}

    every = [verdict for some in verdicts.values() for verdict in some]
    return {**told(every), "by_rank": {rank: told(some) for rank, some in sorted(verdicts.items())}}


def begin(output: Path, settings: dict[str, Any], more: dict[str, Any], resume: bool, *folders: str) -> None:
    """Make the folder of a new batch, with these in it, or see that the one there was begun with the same settings."""
    if not (resume and (output / SETTINGS).is_file()):
        require_new(output)
        content = {**settings, **more, "id": uuid.uuid4().hex}

        def fill(folder: Path) -> None:
            for name in folders:
                (folder / name).mkdir()
            (folder / SETTINGS).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")

        write_whole(output, fill)
        return
    before = settings_of(output)
    for key, now in settings.items():
        if before.get(key) != now:
            raise UsageError(
                f"{output} was begun with {key} {before.get(key)}, not {now}: name another directory to begin anew."
            )


def settings_of(output: Path) -> dict[str, Any]:
    try:
        content = json.loads((output / SETTINGS).read_text("utf-8"))
        return {**content, "id": str(content["id"]), "slots": dict(content["slots"]), "picture": content["picture"]}
    except OSError:
        raise UsageError(f"{output} is no batch: it has no {SETTINGS}. `openm6 images batch` makes one.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{output / SETTINGS} is damaged: make the batch again.") from None


def go_on(path: Path) -> dict[int, dict[str, Any]]:
    """The last row of every prompt that is whole, by the prompt's number. What a kill has left of another is cut.

    Raises DataError for a damaged line."""
    done: dict[int, dict[str, Any]] = {}
    place = end = 0
    cut_torn_line(path)
    for place, row in enumerate(whole_lines(path), 1):
        try:
            number, rank, of = row["prompt"], row["rank"], row["of"]
        except (KeyError, TypeError):
            raise DataError(f"{path}:{place} is no candidate of a batch: delete the line.") from None
        if rank == of:
            done[number], end = row, place
    if end < place:
        write(path, map(as_line, islice(whole_lines(path), end)))
    return done


def open_rejects(path: Path, source: Source, share: float = 0.05) -> Rejects:
    """Counted anew by every call, those of the reading of the source too. More than `share` of all stop the work."""
    path.unlink(missing_ok=True)
    rejects = Rejects(path, share)
    rejects.saw(len(source))
    for reject in source.rejected:
        rejects.count(reject.where, reject.reason, source.name)
    return rejects


def write_review(output: Path) -> Path:
    """Write the page on which people accept or reject the candidates of a batch, pictures or, with a column `said`,
    texts; their verdicts stay in the browser until they are downloaded as labels.jsonl."""
    settings = settings_of(output)
    pictures = []
    for row in rows_of(output):
        if row["rank"] == 0:  # a prompt for which nothing was kept
            continue
        asked: dict[bool, list[str]] = {True: [], False: []}  # pictures, and the rest
        for slot, value in row["asked"].items():
            asked[settings["slots"].get(slot) == "image"].append(str(value))
        shown = {"file": row["file"], "text": " · ".join(asked[False]), "given": asked[True]}
        pictures.append({**shown, "said": row["said"]} if "said" in row else shown)
    data = json.dumps({"id": settings["id"], "pictures": pictures}, ensure_ascii=False)
    page = Path(__file__).with_name("review.html").read_text("utf-8")
    # A text that holds </script> must not end the script.
    page = page.replace("@TITLE@", html.escape(output.resolve().name)).replace("@DATA@", data.replace("<", "\\u003c"))
    return write(output / PAGE, [page])


def verdicts_on(known: Container[str], output: Path, what: str, labels: str | Path) -> dict[str, bool]:
    """People's verdicts on the candidates of a batch, by name. Raises DataError for one of a candidate that it has not
    (`what`: picture, text), and as `verdicts_of` does."""
    found = verdicts_of(labels)
    for name, (_, where) in found.items():
        if name not in known:
            raise DataError(f"{where}: the batch {output} has no {what} {name[:80]!r}; are these its labels?")
    return {name: verdict for name, (verdict, _) in found.items()}


def verdicts_of(labels: str | Path) -> dict[str, tuple[bool, str]]:
    """By picture: the verdict, and where it stands."""
    found: dict[str, tuple[bool, str]] = {}
    for row in read_jsonl(str(labels), None, refuse):
        where, file, accepted = row["_where"], row.get("file"), row.get("accepted")
        if not isinstance(file, str):
            raise DataError(f'{where} names no picture: a line has to be {{"file": ..., "accepted": true or false}}.')
        if not isinstance(accepted, bool):
            raise DataError(f"{where}: accepted is {cut(accepted)!r}; a verdict is true or false.")
        before, there = found.setdefault(file, (accepted, where))
        if before != accepted:
            words = ("rejected", "accepted")
            raise DataError(
                f"{where}: {file} is {words[accepted]} here, and {words[before]} in {there}: keep one line."
            )
    if not found:
        raise DataError(f"{labels} holds no label.")
    return found


def refuse(reject: Reject) -> None:
    raise DataError(reject.reason)


def rows_of(output: Path) -> Iterator[dict[str, Any]]:
    return whole_lines(output / CANDIDATES)


def as_line(content: Mapping[str, Any]) -> str:
    return dumps(content) + "\n"


def write(path: Path, parts: Iterable[str]) -> Path:
    """A file that appears whole."""

    def fill(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)

    try:
        write_file(path, fill)
    except OSError as error:
        raise write_failed(path, error) from None
    return path


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
