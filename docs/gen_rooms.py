"""mkdocs hook: tables of the packages with their layers (`<!-- ROOMS -->`) and of the commands (`<!-- COMMANDS -->`).

The packages are parsed; the commands are imported, which needs no PyTorch.
"""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command

from openm6.cli import commands

ROOT = Path(__file__).parents[1]
ROOMS, COMMANDS = "<!-- ROOMS -->", "<!-- COMMANDS -->"


def rooms(root: Path = ROOT) -> str:
    """A table of the layers, from top to bottom, with the first sentences of their packages."""
    contract = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]
    lines = ["| layer | package | what it is |", "| --- | --- | --- |"]
    for number, layer in enumerate(contract["layers"], 1):
        for name in layer.split(" | "):
            file = root / "openm6" / name / "__init__.py"
            source = file if file.is_file() else root / "openm6" / f"{name}.py"
            text = (ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "").partition("\n\n")[0]
            lines.append(f"| {number} | `{name}` | {' '.join(text.split())} |")
            number = ""
    return "\n".join(lines)


def command_table() -> str:
    """A table of the top-level commands and groups, each with its subcommands and the first sentence of its help."""
    lines = ["| command | subcommands | purpose |", "| --- | --- | --- |"]
    program: Any = get_command(commands())
    for name, command in sorted(program.commands.items()):
        within = ", ".join(f"`{each}`" for each in command.commands) if isinstance(command, TyperGroup) else ""
        help_text = escape(" ".join((command.help or "").partition("\n\n")[0].split()), quote=False)
        lines.append(f"| `openm6 {name}` | {within} | {help_text.replace('|', '&#124;')} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, table in ((ROOMS, rooms), (COMMANDS, command_table)):
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown
