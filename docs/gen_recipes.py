"""mkdocs hook: the recipes of the package, where a page says `<!-- RECIPES -->`."""

from __future__ import annotations

from html import escape
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "openm6" / "train" / "recipes"
MARK = "<!-- RECIPES -->"


def recipe_list(folder: Path = FOLDER) -> str:
    """A table of all recipes, then a section for each: the comment at its top, and the file."""
    lines = ["| recipe | starts from | learns | steps | leaves |", "| --- | --- | --- | --- | --- |"]
    sections = []
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text("utf-8")
        recipe: dict[str, Any] = yaml.safe_load(text)
        lines.append(f"| [`{path.stem}`](#{path.stem}) | {' | '.join(_facts(recipe))} |")
        head = list(takewhile(lambda line: line.startswith("#"), text.splitlines()))
        body = text.split("\n", len(head))[-1].strip()
        sections.append(f"## {path.stem} {{ #{path.stem} }}\n\n{_comment(head)}\n\n```yaml\n{body}\n```")
    return "\n\n".join(["\n".join(lines), *sections])


def _facts(recipe: dict[str, Any]) -> list[str]:
    model = recipe.get("model", {})
    start = f"`{model['path']}`" if "path" in model else "nothing"
    if "codec" in model:
        start += f", codec `{model['codec']}`"
    learned = dict.fromkeys(source["task"] for source in recipe["data"] if "task" in source)
    tasks = ", ".join(f"`{task}`" for task in learned) or "an image codec"
    return [start, tasks, f"{recipe['train']['steps']:,}", f"`{recipe['output']}/model`"]


def _comment(lines: list[str]) -> str:
    """The comment at the top as Markdown: indented lines are commands."""
    parts = []
    for are_commands, group in groupby((line[2:] for line in lines), lambda line: line.startswith("  ")):
        text = "\n".join(line.removeprefix("  ") for line in group)
        parts.append(f"```bash\n{text}\n```" if are_commands else escape(text, quote=False))
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, recipe_list()) if MARK in markdown else markdown
