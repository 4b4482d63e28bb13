"""Printing for people, or JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, Literal

import typer

from openm6.environment import NO_CACHE


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


def table(columns: list[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(title=None if title is None else Text(title))  # Text: no markup of a user's words takes effect
    for column in columns:
        view.add_column(Text(column), overflow="fold")
    for row in rows:
        view.add_row(*(Text(str(cell)) for cell in row))
    Console().print(view)


def show_measures(rows: dict[str, dict[str, float]], title: str) -> None:
    """{what was measured: {measure: value}} with a row for each measure."""
    names = list(next(iter(rows.values())))
    table(["measure", *rows], [[name, *(f"{row[name]:.3f}" for row in rows.values())] for name in names], title)


@contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A function that takes how many are done and shows it with the time left: as a bar on a terminal, else as a line
    now and then. Both go to standard error."""
    from openm6.review import progress

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
    from openm6.errors import UsageError

    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} is {text!r}: give a share such as 0.5% or 0.005.") from None


def pairs(values: list[str]) -> dict[str, str]:
    """`["a=b"]` to `{"a": "b"}`. Raises UsageError for another form, and for a name with two values."""
    from openm6.errors import UsageError

    found: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise UsageError(f'"{value}" is not of the form name=value.')
        if found.setdefault(key, rest) != rest:
            raise UsageError(f'{key} is given twice: "{found[key]}" and "{rest}".')
    return found
