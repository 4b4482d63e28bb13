"""mkdocs hook: every command with its arguments and options, read from the program, for `<!-- CLI -->` on a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any

from typer._click import Context
from typer.main import get_command

from openm6.cli import commands

MARK = "<!-- CLI -->"
OF_EVERY_PROGRAM = ("help", "install_completion", "show_completion")


def cli_reference() -> str:
    """A section for each command, in the order of their names; a group's commands follow the group."""
    program = get_command(commands())
    return "\n\n".join(_sections("openm6", program, Context(program, info_name="openm6")))


def _sections(words: str, command: Any, context: Any) -> Iterator[str]:
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ")
    parts = [f"{'##' if words.count(' ') < 2 else '###'} {words}", _text(command.help or ""), f"```text\n{usage}\n```"]
    records = [p.get_help_record(context) for p in command.params if p.name not in OF_EVERY_PROGRAM and not p.hidden]
    if rows := [f"| <code>{_cell(_name(name))}</code> | {_text(about)} |" for name, about in filter(None, records)]:
        parts.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *rows]))
    yield "\n\n".join(part for part in parts if part)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _sections(f"{words} {name}", inner, type(context)(inner, parent=context, info_name=name))


def _name(shown: str) -> str:
    """An option with its type, without `list[...]` and `range`: the meaning names repeatable options and bounds."""
    return re.sub(r"list\[(\w+)\]", lambda found: found[1].lower(), shown).replace(" range>", ">")


def _text(text: str) -> str:
    """A help text as Markdown: lines of one paragraph joined, what stands in backquotes left as it is."""
    joined = re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())
    parts = (p if p.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", _cell(p)) for p in re.split(r"(`.*?`)", joined))
    return "".join(parts)


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "&#124;")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, cli_reference()) if MARK in markdown else markdown
