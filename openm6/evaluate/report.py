"""Reports: figures with intervals, example pictures with answers, training curves; answers as JSON lines.

A report is a folder: report.md, index.html (the same, made from it), report.json and the pictures.
"""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from openm6.core.extras import require
from openm6.core.files import lines_of, write_failed, write_file
from openm6.core.images import open_image
from openm6.data.writers import write_jsonl
from openm6.evaluate.measure import Case, Evaluation

_STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", sans-serif; max-width: 1000px; margin: 2em auto;
  padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border: 1px solid #ddd; padding: 4px 10px; text-align: left }
th { background: #f4f4f4 }
img { vertical-align: middle; max-width: 100% }
td img { width: 96px }
td strong { color: #1a6b2d }
"""


def write_report(
    folder: Path,
    title: str,
    evaluations: list[Evaluation],
    *,
    intro: str = "",
    figures: list[dict[str, Any]] | None = None,
    metrics: Path | None = None,
    examples: int = 8,
) -> Path:
    """Write the report and return the path of its index.html.

    `figures`: rows {name, value, low, high, n} for a table above the metrics. `metrics`: a run's metrics.jsonl,
    drawn as curves.
    """
    pictures = folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    parts = [f"# {title}", intro]
    if figures:
        rows = [(f["name"], f"{f['value']:.1%}", f"{f['low']:.1%} – {f['high']:.1%}", f["n"]) for f in figures]
        parts.append(markdown_table(("question", "accuracy", "95% interval", "records"), rows))
    if metrics and metrics.is_file():
        draw_curves(metrics, pictures / "curves.png")
        parts.append("## Training\n\n![loss by task, throughput](pictures/curves.png)")
    for evaluation in evaluations:
        rows = [(n, f"{s.value:.4f}", f"{s.low:.4f} – {s.high:.4f}", s.n) for n, s in evaluation.scores.items()]
        heading = f"## {evaluation.task}" + (f" · {evaluation.source}" if evaluation.source else "")
        parts += [_escape(heading), markdown_table(("metric", "value", "95% interval", "records"), rows)]
        parts += [*map(_escape, evaluation.notes), *_label_tables(evaluation)]
        parts.append(_examples(evaluation, pictures, examples))
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text, "utf-8")
    content = {"title": title, "figures": figures or [], "evaluations": [e.to_dict() for e in evaluations]}
    (folder / "report.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return _write_html(folder / "index.html", title, text)


def write_pictures(
    folder: Path,
    title: str,
    intro: str,
    rows: Mapping[str, Mapping[str, float]],
    shown: Iterable[tuple[str, Image.Image]],
) -> Path:
    """Write a report of generated pictures: `rows` of metrics, and pictures with prompts. Returns its index.html."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    names = list(list(rows.values())[-1])
    figures = [(name, *(f"{row[name]:.3f}" for row in rows.values())) for name in names]
    cells = []
    for number, (text, picture) in enumerate(shown):
        picture.resize((192, 192)).save(pictures / f"{number}.png")
        cells.append((f"![](pictures/{number}.png)", _escape(text)))
    pairs = [(*cells[i], *cells[i + 1]) for i in range(0, len(cells) - 1, 2)]
    parts = [f"# {title}", intro, markdown_table(("measure", *rows), figures)]
    text = "\n\n".join([*parts, markdown_table(("picture", "prompt") * 2, pairs)]) + "\n"
    (folder / "report.md").write_text(text, "utf-8")
    content = {"title": title, "rows": rows}
    (folder / "report.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return _write_html(folder / "index.html", title, text)


def _write_html(path: Path, title: str, text: str) -> Path:
    require("eval", "markdown")
    from markdown import markdown

    body = markdown(text, extensions=["tables"])
    path.write_text(
        f'<!doctype html><html><head><meta charset="utf-8"><title>{_escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n",
        "utf-8",
    )
    return path


def _label_tables(evaluation: Evaluation) -> Iterator[str]:
    """Figures by label, and the confusion matrix with the diagonal in bold and without zeros."""
    for title, columns, rows in evaluation.labels.tables(matrix=20, rows=50) if evaluation.labels else ():
        cells = [[_escape(cell) for cell in row] for row in rows]
        if title == "confusion matrix":
            cells = [[row[0], *("" if cell == "0" else cell for cell in row[1:])] for row in cells]
            for number, row in enumerate(cells):
                row[number + 1] = f"**{row[number + 1] or 0}**"
        yield f"### {title[0].upper()}{title[1:]}"
        yield markdown_table(map(_escape, columns), cells)


def _examples(evaluation: Evaluation, pictures: Path, count: int) -> str:
    """A table of examples, wrong answers first and at most half. Answers count as wrong only for tasks measured by
    accuracy or exact match: a caption in other words than the references is not a mistake.
    """
    judged = not evaluation.scores.keys().isdisjoint({"accuracy", "exact_match"})
    wrong = [c for c in evaluation.cases if judged and c.answer not in c.references]
    right = [c for c in evaluation.cases if not judged or c.answer in c.references]
    chosen = wrong[: count // 2]
    chosen += right[: count - len(chosen)]
    if not chosen:
        return ""
    rows = []
    for number, case in enumerate(chosen):
        shown, asked = _inputs(
            case, evaluation.inputs, pictures, f"{evaluation.task}-{len(list(pictures.iterdir()))}-{number}"
        )
        mark = "✗ " if judged and case.answer not in case.references else ""
        rows.append((shown, asked, f"{mark}{_escape(case.answer)}", _escape(case.references[0])))
    return markdown_table(("picture", "input", "answer", "reference"), rows)


def _inputs(case: Case, inputs: Mapping[str, str], pictures: Path, name: str) -> tuple[str, str]:
    """The input pictures, saved beside the report, and the input texts, for two cells."""
    shown, asked = "", []
    for slot, kind in inputs.items():
        value = case.record.get(slot)
        if value is None or str(value) in case.references:
            continue
        if kind == "image":
            file = pictures / f"{name}-{slot}.png"
            open_image(value, draft=(256, 256)).save(file)
            shown += f"![]({file.parent.name}/{file.name})"
        else:
            asked.append(_escape(str(value)[:200]))
    return shown, "<br>".join(asked)


def draw_curves(metrics: Path, target: Path) -> None:
    """Plot loss by task and tokens per second over the steps of a metrics.jsonl, as a PNG."""
    require("eval", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in lines_of(metrics.read_text("utf-8"))]
    lines = [line for line in lines if "loss" in line]
    if not lines:
        return
    steps = [line["step"] for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4))
    for task in sorted({name for line in lines for name in line["loss_by_task"]}):
        points = [(line["step"], line["loss_by_task"][task]) for line in lines if task in line["loss_by_task"]]
        left.plot(*zip(*points, strict=True), label=task, linewidth=1)
    left.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    left.legend(fontsize=7)
    right.plot(steps, [line["tokens_per_second"] for line in lines], linewidth=1)
    right.set(xlabel="step", ylabel="tokens per second", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + " --- |" * (lines[0].count("|") - 1))
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Escape HTML and Markdown in the text of a model or a record."""
    text = html.escape(text)
    for sign in "\\`*_[]":
        text = text.replace(sign, f"\\{sign}" if sign != "\\" else "&#92;")
    return text


def write_answers(path: Path, evaluation: Evaluation) -> None:
    """Write a line per record, in order: {"where", "inputs", "answer", "references", "scores"}, or {"where", "error"}
    for a rejected one. The file is written atomically. Raises OpenM6Error if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda draft: write_jsonl(draft, (), lambda: _answer_lines(evaluation)))
    except OSError as error:
        raise write_failed(path, error) from None


def _answer_lines(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    rejects = list(reversed(evaluation.rejects))
    for number, case in enumerate(evaluation.cases):
        while rejects and rejects[-1][0] <= number:
            reject = rejects.pop()[1]
            yield {"where": reject.where, "error": reject.reason}
        inputs = {n: case.record[n] for n in evaluation.inputs if not isinstance(case.record.get(n), bytes | None)}
        scores = {name: round(float(values[number]), 6) for name, values in evaluation.examples.items()}
        yield {
            "where": str(case.record.get("_where", f"record {number}")), "inputs": inputs, "answer": case.answer,
            "references": case.references, "scores": {n: s for n, s in scores.items() if not math.isnan(s)},
        }  # fmt: skip
    yield from ({"where": reject.where, "error": reject.reason} for _, reject in reversed(rejects))
