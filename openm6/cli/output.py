"""Printing for people, or JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from openm6.environment import NO_CACHE


def _set_no_cache(value: bool) -> bool:
    if value:
        os.environ[NO_CACHE] = "1"  # the processes that a training starts see it too
    return value


NoCache = Annotated[
    bool, typer.Option("--no-cache", callback=_set_no_cache, help="Read the files anew, and keep nothing of them.")
]
Encoding = Annotated[str | None, typer.Option(help="The encoding of text files that are not UTF-8, as big5.")]
Names = Annotated[str | None, typer.Option(help="The columns of a table without a header: id,image,text.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def emit(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def table(columns: list[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title)
    for column in columns:
        view.add_column(column)
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
    Console().print(view)


def show_measures(rows: dict[str, dict[str, float]], title: str) -> None:
    """{what was measured: {measure: value}} with a row for each measure."""
    names = list(next(iter(rows.values())))
    table(["measure", *rows], [[name, *(f"{row[name]:.3f}" for row in rows.values())] for name in names], title)


def share(text: str, option: str) -> float:
    """`0.5%`, or `0.005`."""
    from openm6.errors import UsageError

    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} is {text!r}: give a share such as 0.5% or 0.005.") from None


def pairs(values: list[str]) -> dict[str, str]:
    """`["a=b"]` to `{"a": "b"}`."""
    from openm6.errors import UsageError

    found = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise UsageError(f'"{value}" is not of the form name=value.')
        found[key] = rest
    return found
