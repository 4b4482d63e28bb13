"""The command line's program, to which each module of this package adds its commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from openm6._version import __version__
from openm6.core.environment import EXTENSIONS

app = typer.Typer(
    help="OpenM6: one model that reads images and Chinese text, answers, describes and writes.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    extension: Annotated[
        list[Path] | None,
        typer.Option(
            envvar=EXTENSIONS,
            help="A Python file of your own, run first: slot types, heads, metrics (openm6.tasks.extend).",
        ),
    ] = None,
) -> None:
    """OpenM6."""
    if extension:
        from openm6.tasks.extend import load_extension

        os.environ[EXTENSIONS] = os.pathsep.join(str(path.resolve()) for path in extension)  # for further processes
        for path in extension:
            load_extension(path)
