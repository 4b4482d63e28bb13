"""Output: tables, progress, JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from openm6.core.errors import UsageError, set_once
from openm6.data.rejects import Reject, Rejects

if TYPE_CHECKING:
    from rich.text import Text

EVERY = 30.0
"""Seconds between two progress lines without a terminal."""


def emit(value: Any) -> None:
    """Print a JSON document."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def tell(as_json: bool, value: Any, text: str) -> None:
    """Print a result: `value` as JSON, or `text`."""
    emit(value) if as_json else typer.echo(text)


LONGEST_WORD = 24
"""Number of characters up to which a table does not break a word; longer words, such as paths, are folded."""


def table(columns: list[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """Print a table; on a terminal too narrow for whole words, every row becomes a table with a line per column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    cells = [[Text(str(cell)) for cell in row] for row in rows]  # Text: no markup of user data takes effect
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
    """The column widths at which a table fits without a broken word; None if there are none."""
    from rich.cells import cell_len

    columns = list(zip(*cells, strict=True))
    words = [[cell_len(word) for text in column for word in text.plain.split()] for column in columns]
    widths = [min(LONGEST_WORD, max(lengths, default=1)) for lengths in words]
    most = [max((text.cell_len for text in column), default=1) for column in columns]
    left = room - sum(widths) - 3 * len(columns) - 1  # two spaces and a line per column, and the last line
    if left < 0:
        return None
    while left and (narrow := [n for n, width in enumerate(widths) if width < most[n]]):
        widths[min(narrow, key=lambda n: widths[n])] += 1
        left -= 1
    return widths


def show_measures(rows: dict[str, dict[str, float]], title: str) -> None:
    """Print {name: {measure: value}} with a row per measure."""
    names = list(next(iter(rows.values())))
    table(["measure", *rows], [[name, *(f"{row[name]:.3f}" for row in rows.values())] for name in names], title)


def show_acceptance(found: dict[str, Any], what: str, json: bool) -> None:
    """Print the acceptance rates of a `labels` command (studio.review.write_labels), in all and by rank."""
    if json:
        emit(found)
        return
    rows = [("all", found), *found["by_rank"].items()]
    table(["rank", "accepted", what], [[n, f"{r['accepted']:.1%}", r["labelled"]] for n, r in rows])
    typer.echo(f"Training data: {found['file']}")


def write_rejects(path: Path, rejects: Iterable[Reject], used: int) -> Rejects | None:
    """Replace the file by the rejected records of this call; None without any. `used`: number of other records."""
    path.unlink(missing_ok=True)
    found = Rejects(path, max_fraction=1)
    found.saw(used)
    for reject in rejects:
        found.count(reject.where, reject.reason)
    return found if found.bad else None


def say_rejects(rejects: Rejects | None) -> None:
    if rejects:
        typer.echo(f"{rejects.summary()}. All with their reasons: {rejects.path}")


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows progress and the time left on standard error: as a bar on a terminal, else
    as a line of less than 80 columns every EVERY seconds."""
    first: tuple[int, float] | None = None
    last = time.monotonic()

    def print_line(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None:  # records of an earlier run took no time
            first = (done, now)
        elif now - last >= EVERY and done > first[0]:
            last, left = now, (total - done) * (now - first[1]) / (done - first[0])
            typer.echo(f"{done} of {total} {what}, about {timedelta(seconds=round(left))} left.", err=True)

    if not sys.stderr.isatty():
        yield print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def share(text: str, option: str) -> float:
    """`0.5%` or `0.005` as a fraction. Raises UsageError."""
    with suppress(ValueError):
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if found >= 0:  # nan is not
            return found
    raise UsageError(f"{option} is {text!r}: give a fraction such as 0.5% or 0.005.")


def pairs(values: list[str]) -> dict[str, str]:
    """`["a=b"]` to `{"a": "b"}`. Raises UsageError for another form and for a name with two values."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise UsageError(f'"{value}" is not of the form name=value.')
        set_once(found, key, rest)
    return found
