"""mkdocs hook: the table of tasks, made from openm6/tasks/library where a page says `<!-- TASKS -->`."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

LIBRARY = Path(__file__).parents[1] / "openm6" / "tasks" / "library"
MARK = "<!-- TASKS -->"


def task_table(folder: Path = LIBRARY) -> str:
    """A row a task file: name and description, the first instruction, the number of instructions, metrics."""
    lines = ["| task | first instruction | variants | metrics |", "| --- | --- | --- | --- |"]
    for path in sorted(folder.glob("*.yaml")):
        task: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        instructions = task.get("instructions") or [task["instruction"]]
        name = f"`{task.get('name', path.stem)}`<br>{escape(task.get('description', ''))}"
        # A table takes `|` for the end of a cell, inside code too.
        first = f"<code>{escape(instructions[0]).replace('|', '&#124;')}</code>"
        lines.append(f"| {name} | {first} | {len(instructions)} | {', '.join(task.get('metrics', []))} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, task_table()) if MARK in markdown else markdown
