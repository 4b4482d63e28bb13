"""Printing for people, or JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openm6.core.environment import NO_CACHE

if TYPE_CHECKING:
    from rich.text import Text

    from openm6.data.rejects import Reject, Rejects


def _set_no_cache(value: bool) -> bool:
    if value:
        os.environ[NO_CACHE] = "1"  # the processes that a training starts see it too
    return value


NoCache = Annotated[
    bool, typer.Option("--no-cache", callback=_set_no_cache, help="Read the files anew, and keep nothing of them.")
]
Column = Annotated[list[str] | None, typer.Option("--column", "-c", help="slot=column, when names differ.")]
Format = Annotated[str | None, typer.Option("--format", help="The data's format, when its name does not say.")]
Images = Annotated[str | None, typer.Option(help="Folder that picture paths start from.")]
Encoding = Annotated[str | None, typer.Option(help="The encoding of text files that are not UTF-8, as big5.")]
Names = Annotated[str | None, typer.Option(help="The columns of a table without a header: id,image,text.")]

Truncate = Annotated[
    Literal["start"] | None,
    typer.Option(help="Leave out the beginning of the longest text where a record is too long for the model."),
]

EVERY = 30.0
"""Seconds between two lines of progress, where there is no terminal for a bar."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def emit(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


LONGEST_WORD = 24
"""Characters of a name that a table does not break; longer ones, such as paths, are folded."""


def table(columns: list[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """Print a table. Where the terminal is too narrow for names and numbers in one piece, every row becomes a table of
    its own with a line for each column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    cells = [[Text(str(cell)) for cell in row] for row in rows]  # Text: no markup of a user's words takes effect
    heads = [Text(column) for column in columns]
    widths = _column_widths([heads, *cells], console.width)
    if widths is None and len(heads) > 2 and cells:
        for row in cells:
            table(["", ""], zip(columns, row, strict=True), title)
        return
    view = Table(title=None if title is None else Text(title))
    for number, head in enumerate(heads):
        view.add_column(head, overflow="fold", width=widths[number] if widths else None)
    for row in cells:
        view.add_row(*row)
    console.print(view)


def _column_widths(cells: list[list[Text]], room: int) -> list[int] | None:
    """The widths at which a table fits without a broken word; None where the room is too small for that."""
    from rich.cells import cell_len

    columns = list(zip(*cells, strict=True))
    words = [[cell_len(word) for text in column for word in text.plain.split()] for column in columns]
    widths = [min(LONGEST_WORD, max(lengths, default=1)) for lengths in words]
    most = [max((text.cell_len for text in column), default=1) for column in columns]
    left = room - sum(widths) - 3 * len(columns) - 1  # two spaces and a line for each column, and the last line
    if left < 0:
        return None
    while left and (narrow := [n for n, width in enumerate(widths) if width < most[n]]):
        widths[min(narrow, key=lambda n: widths[n])] += 1
        left -= 1
    return widths


def show_measures(rows: dict[str, dict[str, float]], title: str) -> None:
    """{what was measured: {measure: value}} with a row for each measure."""
    names = list(next(iter(rows.values())))
    table(["measure", *rows], [[name, *(f"{row[name]:.3f}" for row in rows.values())] for name in names], title)


def write_rejects(path: Path, rejects: Iterable[Reject], used: int) -> Rejects | None:
    """Write the records that a command has passed over into the file, in the place of what it holds of an earlier call.
    None where there are none; `used`: the records beside them that could be used."""
    from openm6.data.rejects import Rejects

    path.unlink(missing_ok=True)
    found = Rejects(path, share=1)
    found.saw(used)
    for reject in rejects:
        found.count(reject.where, reject.reason)
    return found if found.bad else None


def say_rejects(rejects: Rejects | None) -> None:
    if rejects:
        typer.echo(f"{rejects.summary()}. Each stands with its reason in {rejects.path}.")


@contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A function that takes how many are done and shows it with the time left: as a bar on a terminal, else as a line
    now and then. Both go to standard error."""
    from openm6.studio.review import progress

    first = last = (0, time.monotonic())

    def say(done: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        if not first[0]:  # what was there before took no time
            first = (done, now)
        elif now - last[1] >= EVERY:
            last, left = (done, now), (total - done) * (now - first[1]) / (done - first[0])
            typer.echo(f"{done} of {total} {what}, about {timedelta(seconds=round(left))} left.", err=True)

    if not sys.stderr.isatty():
        yield say
        return
    with progress() as bar:
        row = bar.add_task(what, total=total)
        yield lambda done: bar.update(row, completed=done)


def share(text: str, option: str) -> float:
    """`0.5%`, or `0.005`."""
    from openm6.core.errors import UsageError

    with suppress(ValueError):
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if found >= 0:  # nan is not
            return found
    raise UsageError(f"{option} is {text!r}: give a share such as 0.5% or 0.005.")


def pairs(values: list[str]) -> dict[str, str]:
    """`["a=b"]` to `{"a": "b"}`. Raises UsageError for another form, and for a name with two values."""
    from openm6.core.errors import UsageError, set_once

    found: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise UsageError(f'"{value}" is not of the form name=value.')
        set_once(found, key, rest)
    return found
