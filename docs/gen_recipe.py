"""mkdocs hook: the keys of a recipe, read from its source, where a page says `<!-- RECIPE -->`.

The source is parsed, not imported: building the documentation needs no PyTorch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "openm6" / "train" / "recipe.py"
MARK = "<!-- RECIPE -->"


def recipe_tables(source: Path = SOURCE) -> str:
    """A table a section, in the order of the recipe's own keys."""
    classes = {
        node.name: node for node in ast.walk(ast.parse(source.read_text("utf-8"))) if isinstance(node, ast.ClassDef)
    }
    model = [_table("At the top", classes["Recipe"]), *_sections("Recipe", "", classes)]
    codec = [_table("At the top, of an image codec", classes["CodecRecipe"]), *_sections("CodecRecipe", "", classes)]
    return "\n\n".join(dict.fromkeys([*model, *codec]))  # what both have, once


def _sections(outer: str, prefix: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Tables of the sections inside one, each followed by those inside it."""
    for field in _fields(classes[outer]):
        section = next((n.id for n in ast.walk(field.annotation) if isinstance(n, ast.Name) and n.id in classes), None)
        if section:
            many = " (a list)" if "list" in ast.unparse(field.annotation) else ""
            yield _table(f"`{prefix}{_name(field)}`{many}", classes[section])
            yield from _sections(section, f"{prefix}{_name(field)}.", classes)


def _table(title: str, section: ast.ClassDef) -> str:
    lines = [f"### {title}", ""]
    if text := ast.get_docstring(section):
        lines += [text.replace("\n", " "), ""]
    lines += ["| key | values | default | |", "| --- | --- | --- | --- |"]
    for field in _fields(section):
        default, about = _default(field.value)
        kind = ast.unparse(field.annotation).replace(" | None", "")
        if kind.startswith("Literal["):
            kind = kind.removeprefix("Literal[").removesuffix("]").replace("'", "")
        cells = (
            f"`{_name(field)}`",
            f"<code>{_cell(kind)}</code>",
            f"<code>{_cell(default)}</code>" if default else "needed",
            _cell(about),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fields(section: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    return (node for node in section.body if isinstance(node, ast.AnnAssign) and _name(node) != "model_config")


def _name(field: ast.AnnAssign) -> str:
    return ast.unparse(field.target)


def _default(value: ast.expr | None) -> tuple[str, str]:
    """The default as it is written ("" where the key is needed), and the description."""
    if value is None:
        return "", ""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "Field"):
        return "{}" if isinstance(value, ast.Call) else _as_yaml(ast.unparse(value)), ""
    words = {k.arg: k.value for k in value.keywords}
    about = ast.literal_eval(words["description"]) if "description" in words else ""
    if "default_factory" in words:
        return {"dict": "{}", "list": "[]"}.get(ast.unparse(words["default_factory"]), ""), about
    default = value.args[0] if value.args else words.get("default")
    return "" if default is None else _as_yaml(ast.unparse(default)), about


def _as_yaml(text: str) -> str:
    return {"True": "true", "False": "false", "None": "none"}.get(text, text)


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "&#124;")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, recipe_tables()) if MARK in markdown else markdown
