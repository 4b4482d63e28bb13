"""Shared by batches of pictures and of texts: a folder that can be resumed, the review page, human labels.

candidates.jsonl has a line per candidate: the file or name that labels refer to, the number of its prompt, its rank
among the kept candidates of that prompt, and their number.
"""

from __future__ import annotations

import html
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.bases import directory_hash
from openm6.core.errors import DataError, UsageError, cut
from openm6.core.files import (
    cut_torn_line,
    dumps,
    lock_output,
    require_new,
    whole_lines,
    write_failed,
    write_file,
    write_json,
    write_whole,
)
from openm6.data.rejects import Reject, Rejects
from openm6.data.source import Source
from openm6.data.store import Record
from openm6.data.tables import read_jsonl
from openm6.inference.request import Request
from openm6.inference.session import Session
from openm6.tasks.task import Task

SETTINGS, CANDIDATES, REJECTS, PAGE, LABELLED = (
    "batch.json", "candidates.jsonl", "rejects.jsonl", "review.html", "labelled.jsonl",
)  # fmt: skip

COMMANDS = {"texts": "copy", "pictures": "images"}
"""The kinds of batches, each with its command group."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reviewer's label of a candidate. `text`: the edited text, "" if unedited; `where`: its file and line."""

    accepted: bool
    text: str
    where: str

    def line(self, name: str) -> dict[str, Any]:
        """The label of the candidate `name` as a line of labels.jsonl."""
        return {"file": name, "accepted": self.accepted} | ({"text": self.text} if self.text else {})


CONTENT = "content"
"""Key of the hashes of source and model in the settings of a batch (`content_of`)."""


def groups(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def seed_of(seed: int, start: int) -> int:
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, start]).generate_state(1)[0])


def kept_of(keep: int | None, candidates: int, usual: int) -> int:
    """Number of candidates to keep: `keep`, by default `usual`, at most `candidates`. Raises UsageError for a `keep`
    below 1 or above `candidates`."""
    if keep is None:
        return min(usual, candidates)
    if not 1 <= keep <= candidates:
        raise UsageError(f"keep is {keep}; it can be 1 to the number of candidates, {candidates}.")
    return keep


def usable(
    session: Session,
    task: Task,
    ask: Callable[[Record], dict[str, Any]],
    source: Source,
    numbers: Iterable[int],
    rejects: Rejects,
    *,
    decoding: Mapping[str, Any],
    truncate: str | None = None,
    explain: Callable[[DataError, str, Record], str] = lambda error, where, record: str(error),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, inputs by slot) of the valid records among these numbers; the others are counted in `rejects` with the
    reason from `explain`. `ask` gives the inputs of a record and may raise DataError. `decoding` and `truncate` are
    those of Session.run; a record whose answer has no room with them is not valid."""
    for number in numbers:
        record = source[number]
        try:
            asked = ask(record)
            session.prepare(task, Request(asked, truncate=truncate, decoding=decoding))
        except DataError as error:
            where = place_of(source, number, record)
            rejects.count(where, explain(error, where, record), source.name)
        else:
            yield number, asked


def place_of(source: Source, number: int, record: Record) -> str:
    return str(record.get("_where", f"{source.name}#{number}"))


def content_of(session: Session, source: Source) -> dict[str, str]:
    return {"source": source.content_hash(), "model": directory_hash(session.path) if session.path else ""}


def require_same(
    output: Path, settings: Mapping[str, Any], source: Source, begun: Mapping[int, Any],
    asks: Callable[[Record], Mapping[str, Any]],
) -> None:  # fmt: skip
    """Refuse to resume a batch whose source or model has changed. The error names the first changed record: `begun` has
    the inputs of the finished records, `asks` gives the current inputs of a record."""
    before, now = settings_of(output).get(CONTENT, {}), settings[CONTENT]
    if before == now:
        return

    def has_changed(number: int) -> bool:
        try:
            return dumps(begun[number]) != dumps(asks(source[number]))
        except (DataError, IndexError):
            return True

    if before.get("source") == now["source"]:
        where = f"The model {settings['model']}"
    else:
        changed = next((number for number in sorted(begun) if has_changed(number)), len(source))
        where = place_of(source, changed, source[changed]) if changed < len(source) else source.name
    raise UsageError(f"{where} has changed since {output} was started: use another directory.")


@contextmanager
def batch_folder(
    output: Path, settings: dict[str, Any], more: dict[str, Any], resume: bool, *folders: str
) -> Iterator[None]:
    """Open the folder of a batch for this process alone: a new one with these subfolders, or one with the same
    settings. Raises UsageError for other settings or a folder that another process is writing, OpenM6Error if it cannot
    be written."""
    with lock_output(output):
        if resume and (output / SETTINGS).is_file():
            before = settings_of(output)
            for key, now in settings.items():
                if key != CONTENT and before.get(key) != now:  # require_same compares the content
                    message = f"{output} was started with {key} {before.get(key)}, not {now}: use another directory."
                    raise UsageError(message)
        else:
            require_new(output)
            content = {**settings, **more, "id": uuid.uuid4().hex}

            def fill(folder: Path) -> None:
                for name in folders:
                    (folder / name).mkdir()
                write_json(folder / SETTINGS, content)

            write_whole(output, fill)
        try:
            yield
        except OSError as error:
            raise write_failed(output, error) from None


def settings_of(output: Path, kind: str | None = None) -> dict[str, Any]:
    """The settings of a batch. Raises UsageError for another folder or another `kind` (a key of COMMANDS)."""
    try:
        content = json.loads((output / SETTINGS).read_text("utf-8"))
        found = {"kind": "pictures", **content, "id": str(content["id"]), "slots": dict(content["slots"])}
        command = COMMANDS[found["kind"]]
    except OSError:
        makes = " or ".join(f"`openm6 {COMMANDS[name]} batch`" for name in ([kind] if kind else COMMANDS))
        raise UsageError(f"{output} is not a batch: it has no {SETTINGS}. Make one by {makes}.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{output / SETTINGS} is damaged: make the batch again.") from None
    if kind and kind != found["kind"]:
        raise UsageError(f"{output} is a batch of {found['kind']}: `openm6 {command} labels` reads its labels.")
    return found


def go_on(path: Path) -> dict[int, dict[str, Any]]:
    """The last row of every complete prompt, by number. An incomplete prompt at the end is removed from the file.

    Raises DataError for a damaged line."""
    done: dict[int, dict[str, Any]] = {}
    place = end = 0
    cut_torn_line(path)
    for place, row in enumerate(whole_lines(path), 1):
        try:
            number, rank, of = row["prompt"], row["rank"], row["of"]
        except (KeyError, TypeError):
            raise DataError(f"{path}:{place} is not a candidate of a batch: delete the line.") from None
        if rank == of:
            done[number], end = row, place
    if end < place:
        write(path, map(as_line, islice(whole_lines(path), end)))
    return done


def open_rejects(path: Path, source: Source, max_fraction: float = 0.05) -> Rejects:
    """A new file of rejected records, with those that the source itself rejected. A fraction above `max_fraction`
    raises DataError."""
    path.unlink(missing_ok=True)
    rejects = Rejects(path, max_fraction)
    rejects.saw(len(source))
    for reject in source.rejected:
        rejects.count(reject.where, reject.reason, source.name)
    return rejects


def write_review(
    output: Path, items: Iterable[Mapping[str, Any]] | None = None, id_name: str = "item", most: int = 0
) -> Path:
    """Write the page on which people accept, reject or edit the candidates of a batch. Labels stay in the browser until
    they are downloaded as labels.jsonl or as a CSV with a row per item.

    `items`: {"id", "shown": {name: value}, "pictures": [file], "candidates": [{"file", "said"}], "reason"}, where
    "said" is the text of a candidate and "reason" explains missing candidates; by default the items of candidates.jsonl
    and rejects.jsonl. `id_name`: column of the ids in the CSV. `most`: maximum length of a text, 0 for no limit.
    """
    settings = settings_of(output)
    found = list(_prompts(output, settings) if items is None else items)
    about = {"id": settings["id"], "kind": settings["kind"], "idName": id_name, "most": most, "items": found}
    page = Path(__file__).with_name("review.html").read_text("utf-8")
    # A text that holds </script> must not end the script.
    data = json.dumps(about, ensure_ascii=False).replace("<", "\\u003c")
    page = page.replace("@TITLE@", html.escape(output.resolve().name)).replace("@DATA@", data)
    return write(output / PAGE, [page])


def _prompts(output: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    pictures = {name for name, kind in settings["slots"].items() if kind == "image"}
    for number, some in groupby(rows_of(output), key=lambda row: row["prompt"]):
        rows = list(some)
        asked = rows[0]["asked"]
        yield {
            "id": str(number + 1), "candidates": [{"file": row["file"]} for row in rows], "reason": "",
            "shown": {name: str(value) for name, value in asked.items() if name not in pictures},
            "pictures": [str(value) for name, value in asked.items() if name in pictures],
        }  # fmt: skip
    for row in whole_lines(output / REJECTS):
        yield {"id": "", "shown": {}, "pictures": [], "candidates": [], "reason": row["reason"]}


def write_labels(output: Path, labelled: Iterable[tuple[int, bool, Record | None]]) -> dict[str, Any]:
    """Write the training records of labelled candidates, given as (rank, accepted, record or None).

    Returns {"file", "labelled": number, "accepted": fraction, "by_rank": {rank: {"labelled", "accepted"}}}."""
    verdicts: dict[int, list[bool]] = defaultdict(list)

    def lines() -> Iterator[str]:
        for rank, accepted, record in labelled:
            verdicts[rank].append(accepted)
            if record is not None:
                yield as_line(record)

    def rates(some: list[bool]) -> dict[str, Any]:
        return {"labelled": len(some), "accepted": sum(some) / len(some)}

    file = write(output / LABELLED, lines())
    every = [accepted for some in verdicts.values() for accepted in some]
    return {"file": str(file), **rates(every), "by_rank": {rank: rates(verdicts[rank]) for rank in sorted(verdicts)}}


def verdicts_on(known: Container[str], output: Path, what: str, labels: str | Path) -> dict[str, Verdict]:
    """Human labels of the candidates of a batch, by name. `what`: picture or text. Raises DataError for an invalid
    label, for contradictory ones, and for an unknown candidate."""
    found: dict[str, Verdict] = {}
    for row in read_jsonl(str(labels), refuse):
        where, file, accepted, text = row["_where"], row.get("file"), row.get("accepted"), row.get("text", "")
        if not isinstance(file, str):
            raise DataError(f'{where} names no {what}: a line is {{"file": ..., "accepted": true or false}}.')
        if not isinstance(accepted, bool):
            raise DataError(f"{where}: accepted is {cut(accepted)!r}; a verdict is true or false.")
        if "text" in row and not (accepted and what != "picture" and isinstance(text, str) and text.strip()):
            raise DataError(f"{where}: text is {cut(text)!r}; it is the edited form of a text that was accepted.")
        before = found.setdefault(file, Verdict(accepted, text, where))
        if before.accepted != accepted:
            here, there = ("accepted", "rejected") if accepted else ("rejected", "accepted")
            raise DataError(f"{where}: {file} is {here} here, and {there} in {before.where}: keep one line.")
        if before.text != text:
            raise DataError(f"{where}: {file} has another text here than in {before.where}: keep one line.")
    if not found:
        raise DataError(f"{labels} has no labels.")
    for name, verdict in found.items():
        if name not in known:
            raise DataError(f"{verdict.where}: the batch {output} has no {what} {name[:80]!r}; are these its labels?")
    return found


def refuse(reject: Reject) -> None:
    raise DataError(reject.reason)


def rows_of(output: Path) -> Iterator[dict[str, Any]]:
    return whole_lines(output / CANDIDATES)


def as_line(content: Mapping[str, Any]) -> str:
    return dumps(content) + "\n"


def write(path: Path, parts: Iterable[str]) -> Path:
    """Write a file atomically. Raises OpenM6Error if it cannot be written."""

    def fill(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)

    try:
        write_file(path, fill)
    except OSError as error:
        raise write_failed(path, error) from None
    return path
