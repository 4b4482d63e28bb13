"""mkdocs hook: a table for every benchmarks/results/*.json, where a page says `<!-- BENCHMARKS -->`."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MARK = "<!-- BENCHMARKS -->"


def benchmark_tables(folder: Path = RESULTS) -> str:
    """A section a result: {name, title, machine, date, torch, rows: [{column: value}], note}."""
    sections = [_section(json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(sections) or "There are no results yet: `make bench` writes them."


def _section(result: dict[str, Any]) -> str:
    parts = [f"## {escape(result.get('title') or result['name'])}"]
    made = [result.get("machine"), f"PyTorch {result['torch']}" if "torch" in result else None, result.get("date")]
    parts.append(escape(", ".join(str(fact) for fact in made if fact)))
    rows = result.get("rows", [])
    columns = list(
        dict.fromkeys(column for row in rows for column, value in row.items() if not isinstance(value, dict))
    )
    if columns:
        lines = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if result.get("note"):
        parts.append(escape(result["note"], quote=False))
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return escape(text).replace("|", "&#124;")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, benchmark_tables()) if MARK in markdown else markdown
