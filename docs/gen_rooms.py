"""mkdocs hook: the packages of OpenM6 with their layers, read from the source, where a page says `<!-- ROOMS -->`."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "<!-- ROOMS -->"


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


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, rooms()) if MARK in markdown else markdown
