"""Help texts: every command has its purpose, every option is explained."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command

from openm6.cli import commands
from openm6.cli.app import PURPOSES

ROOT = get_command(commands())
assert isinstance(ROOT, TyperGroup)


def parameters(command: Any, words: str = "openm6") -> list[tuple[str, str]]:
    """The name and help of every argument and option of a command and of those below it."""
    found = [(f"{words} {one.name}", one.help or "") for one in command.params]
    for name, below in getattr(command, "commands", {}).items():
        found += [(f"{words} {name}", below.help or ""), *parameters(below, f"{words} {name}")]
    return found


def test_every_command_stands_under_one_purpose() -> None:
    listed = [name for names in PURPOSES.values() for name in names]
    assert sorted(listed) == sorted(ROOT.commands)
    assert ROOT.list_commands(None) == listed  # type: ignore[arg-type]


def test_every_command_and_option_is_explained() -> None:
    told = parameters(ROOT)
    assert [name for name, text in told if not text] == []
    clauses = re.compile(r"(What|Whoever|Whatever|That|Of|Those|How|Whether) ")
    assert [name for name, text in told if clauses.match(text)] == []
    assert [name for name, text in told if "[default" in text] == []  # markup would hide it
