"""The command line: parse, call, print. Heavy imports are inside the commands."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache

import typer
from typer.main import get_command

from openm6.cli.app import app
from openm6.core.errors import OpenM6Error


def commands() -> typer.Typer:
    """The application with all commands, which their modules register on import."""
    from openm6.cli import (  # noqa: F401
        cascade,
        compress,
        copy,
        data,
        demo,
        images,
        jobs,
        models,
        plan,
        search,
        serve,
        work,
    )  # fmt: skip

    return app


def _silence_libraries() -> None:
    """Hide deprecation warnings of libraries, here and in child processes, unless -W or PYTHONWARNINGS is given."""
    if not sys.warnoptions:
        hidden = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
        for kind in hidden:
            warnings.simplefilter("ignore", kind)
        os.environ["PYTHONWARNINGS"] = ",".join(f"ignore::{kind.__name__}" for kind in hidden)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@cache
def _program() -> Callable[[], None]:
    """The application as a callable, built once: typer takes a tenth of a second for it."""
    return get_command(commands())


def main() -> None:
    """Entry point. A user error prints one sentence and exits with code 2, failed work with code 1."""
    _silence_libraries()
    try:
        _program()()
    except OpenM6Error as error:
        typer.secho(str(error), err=True, fg=typer.colors.RED)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.secho("Stopped.", err=True)
        sys.exit(130)
