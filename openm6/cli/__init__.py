"""The command line: parse, call, print. Heavy imports sit inside the commands."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from openm6._version import __version__
from openm6.environment import EXTENSIONS
from openm6.errors import OpenM6Error

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
            envvar=EXTENSIONS, help="A Python file of your own, run first: slot types, heads, metrics (openm6.extend)."
        ),
    ] = None,
) -> None:
    """OpenM6."""
    if extension:
        from openm6.extend import load_extension

        os.environ[EXTENSIONS] = os.pathsep.join(str(path.resolve()) for path in extension)  # for further processes
        for path in extension:
            load_extension(path)


def commands() -> typer.Typer:
    """The program with all its commands, which their modules add to it."""
    from openm6.cli import (  # noqa: F401
        bench,
        cascade,
        compress,
        copy,
        data,
        demo,
        deploy,
        images,
        index,
        jobs,
        models,
        plan,
        predict,
        recommend,
        serve,
        tasks,
        use,
        work,
    )

    return app


def _silence_libraries() -> None:
    """Hide what libraries warn their developers of, here and in further processes; Python's own -W and PYTHONWARNINGS
    go before."""
    if not sys.warnoptions:
        hidden = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
        for kind in hidden:
            warnings.simplefilter("ignore", kind)
        os.environ["PYTHONWARNINGS"] = ",".join(f"ignore::{kind.__name__}" for kind in hidden)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, failed work exit code 1."""
    _silence_libraries()
    try:
        commands()()
    except OpenM6Error as error:
        typer.secho(str(error), err=True, fg=typer.colors.RED)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.secho("Stopped.", err=True)
        sys.exit(130)
