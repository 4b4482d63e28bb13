"""Options shared by several commands."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

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
Format = Annotated[
    str | None, typer.Option("--format", help="Data format if the name does not tell: csv, jsonl, parquet, coco ...")
]
Images = Annotated[str | None, typer.Option(help="Base folder of relative picture paths.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of text files that are not UTF-8, e.g. big5.")]
Names = Annotated[str | None, typer.Option(help="Column names of a table without a header: id,image,text.")]
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
