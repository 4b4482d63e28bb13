"""Options shared by several commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, Literal

import typer

from openm6.cli.output import pairs
from openm6.core.environment import NO_CACHE


def _set_no_cache(value: bool) -> bool:
    if value:
        os.environ[NO_CACHE] = "1"  # for child processes too
    return value


NoCache = Annotated[
    bool, typer.Option("--no-cache", callback=_set_no_cache, help="Read the files again and cache nothing.")
]
Column = Annotated[
    list[str] | None, typer.Option("--column", "-c", help="Column of a slot, slot=column, if names differ; repeatable.")
]
READING: dict[str, Any] = {
    "column": Column,
    "data_format": Annotated[
        str | None,
        typer.Option("--format", help="Data format if the name does not tell: csv, jsonl, parquet, coco ..."),
    ],
    "images": Annotated[str | None, typer.Option(help="Base folder of relative picture paths.")],
    "encoding": Annotated[str | None, typer.Option(help="Encoding of text files that are not UTF-8, e.g. big5.")],
    "names": Annotated[str | None, typer.Option(help="Column names of a table without a header: id,image,text.")],
    "no_cache": NoCache,
}
"""Options of the commands that read data."""


@dataclass(frozen=True)
class Reading:
    """Values of the options READING: column names by slot, data format, picture folder, encoding, column names of a
    table without a header."""

    columns: dict[str, str] = field(default_factory=dict)
    data_format: str | None = None
    images: str | None = None
    encoding: str | None = None
    names: str | None = None

    @property
    def format(self) -> str | None:
        """The data format with encoding and names, as `open_source` takes it."""
        from openm6.data.readers import with_options

        return with_options(self.data_format, self.encoding, self.names)


AUTOMATIC = Reading()


def reads_data(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options READING, except those left out, in the place of its parameter `reading`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = signature(command, eval_str=True)
        options = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if name == "no_cache" else None, annotation=kind)
            for name, kind in READING.items() if name not in left_out
        ]  # fmt: skip

        @wraps(command)
        def run(**given: Any) -> None:
            values = {one.name: given.pop(one.name) for one in options}
            del values["no_cache"]  # its callback has set it
            command(reading=Reading(pairs(values.pop("column", None) or []), **values), **given)

        parameters = [
            new for old in own.parameters.values()
            for new in (options if old.name == "reading" else [old.replace(kind=Parameter.KEYWORD_ONLY)])
        ]  # fmt: skip
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


DecodingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="Decoding option, name=number: num_beams=4, temperature=0.8, seed=1; repeatable."
    ),
]
Truncate = Annotated[
    Literal["start"] | None,
    typer.Option(help="Cut the beginning of the longest text of a record that is too long for the model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
