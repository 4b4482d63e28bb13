"""The Typer application; each module of this package adds its commands to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from openm6._version import __version__
from openm6.core.environment import EXTENSIONS

PURPOSES = {
    "Start": ("demo", "demo-images", "tasks"),
    "Use a model": ("run", "predict", "images", "copy"),
    "Train": ("data", "train", "finetune", "plan"),
    "Evaluate": ("eval", "bench", "reproduce"),
    "Search and recommend": ("index", "recommend"),
    "Convert, compress, run on the edge": ("models", "compress", "cascade"),
    "Serve and operate": ("serve", "keys", "deploy", "deployments", "jobs"),
}
"""All commands and groups by purpose, in the order of `openm6 --help`."""


class ByPurpose(TyperGroup):
    """The root command, whose help lists the commands by purpose."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        for purpose, names in PURPOSES.items():
            for name in names:
                self.commands[name].rich_help_panel = purpose  # type: ignore[attr-defined]
        return [name for names in PURPOSES.values() for name in names]


app = typer.Typer(
    cls=ByPurpose,
    help="OpenM6: a multimodal Transformer for images and Chinese text. It answers, describes, classifies, writes, "
    "draws and retrieves.",
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
            help="Python file to run first, with slot types, heads or metrics (openm6.tasks.extend); repeatable.",
        ),
    ] = None,
) -> None:
    if extension:
        from openm6.tasks.extend import load_extension

        os.environ[EXTENSIONS] = os.pathsep.join(str(path.resolve()) for path in extension)  # for child processes
        for path in extension:
            load_extension(path)
