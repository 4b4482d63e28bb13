"""Evaluation and report of the demo model, on unseen combinations and digits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.extras import require
from openm6.core.images import open_image
from openm6.data.store import iterate
from openm6.evaluate.command import measure
from openm6.evaluate.measure import Case, Evaluation
from openm6.evaluate.report import write_report
from openm6.inference.session import Session
from openm6.tasks.metrics import Values, accuracy, bootstrap
from openm6.worlds.catalogue import open_catalogue, same_attributes
from openm6.worlds.draw import COLOURS

Chosen = Callable[[Case], bool]

_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "SimHei",
          "WenQuanYi Zen Hei")  # fmt: skip

_INTRO = (
    "Every picture below shows a combination of category, colour and pattern that was in no training picture and no "
    "training text (51 of the 256 are held out), or a handwritten digit of the test split. Figures are accuracies with "
    "95% bootstrap intervals."
)


def report_demo(model: Path, output: Path) -> dict[str, Any]:
    """Evaluate the demo's model and write `output/report`.

    Returns {"figures": [{name, value, low, high, n}, ...], "report": path}.
    """
    session = Session.load(model)
    asked = measure(session, "vqa", "demo:questions/test")
    captioned = measure(session, "caption", "demo:catalogue/test")
    digits = measure(session, "vqa", "digits/test")
    filled = measure(session, "infilling", "demo:texts/test", limit=500)
    right = accuracy([c.answer for c in asked.cases], [c.references for c in asked.cases])
    described = Values.mean([float(same_attributes(c.answer, c.references[0])) for c in captioned.cases])

    def questions(kind: str, objects: int | None = None) -> Chosen:
        return lambda c: c.record["kind"] == kind and objects in (None, c.record["objects"])

    figures = [
        _figure("colour, one object", right, asked, questions("colour", 1)),
        _figure("pattern, one object", right, asked, questions("pattern", 1)),
        _figure("category, one object", right, asked, questions("category", 1)),
        _figure("colour, two objects", right, asked, questions("colour", 2)),
        _figure("pattern, two objects", right, asked, questions("pattern", 2)),
        _figure("category, two objects", right, asked, questions("category", 2)),
        _figure("how many objects", right, asked, questions("count")),
        _figure("relation of two objects", right, asked, questions("relation")),
        _figure("caption: category, colour, pattern", described, captioned, lambda c: c.record["objects"] == 1),
        _figure("caption of two objects: all six", described, captioned, lambda c: c.record["objects"] == 2),
        _figure("handwritten digit", accuracy(*_answers(digits)), digits, lambda c: True),
        _accuracy("gap in a sentence filled, the rest unchanged", gaps_filled(session)),
    ]
    folder = output / "report"
    page = write_report(
        folder, "OpenM6 demo", [asked, captioned, digits, filled], intro=_INTRO, figures=figures,
        metrics=output / "metrics.jsonl",
    )  # fmt: skip
    draw_answers(captioned.cases, asked.cases, digits.cases, folder / "demo.png")
    samples = output / "pictures"  # to ask the model about
    samples.mkdir(exist_ok=True)
    for number, case in enumerate(captioned.cases[:8], 1):
        (samples / f"goods-{number}.jpg").write_bytes(case.record["image"])
    (folder / "figures.json").write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return {"figures": figures, "report": str(page)}


def _answers(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    return [c.answer for c in evaluation.cases], [c.references for c in evaluation.cases]


def gaps_filled(session: Session, limit: int = 500) -> list[float]:
    """For sentences about held-out goods with the colour blanked: 1 if the answer has a colour in the gap and the rest
    unchanged, else 0."""
    colour = re.compile("|".join(name + "色" for name in COLOURS))
    sentences = [r["text"] for r in iterate(open_catalogue("texts", "test")) if r["kind"] == "sentence"][:limit]
    parts = [(t[: m.start()], t[m.end() :]) for t in sentences if (m := colour.search(t))]
    answers = session.run_many("infilling", ({"text": f"{before}____{after}"} for before, after in parts))
    return [
        float(re.fullmatch(re.escape(before) + f"({colour.pattern})" + re.escape(after), answer) is not None)
        for (before, after), answer in zip(parts, answers, strict=True)
    ]


def _figure(name: str, values: Values, evaluation: Evaluation, chosen: Chosen) -> dict[str, Any]:
    rows = [row for row, case in enumerate(evaluation.cases) if chosen(case)]
    return _accuracy(name, [values.corpus(np.array([row])) for row in rows])


def _accuracy(name: str, right: list[float]) -> dict[str, Any]:
    values = Values.mean(right)
    low, high = bootstrap(len(right), values.corpus)
    return {"name": name, "value": values.corpus(np.arange(len(right))), "low": low, "high": high, "n": len(right)}


def draw_answers(captioned: list[Case], asked: list[Case], digits: list[Case], target: Path, seed: int = 0) -> None:
    """Write a sheet of randomly chosen pictures with question and answer, green if right. Does nothing without an
    installed Chinese font."""
    require("eval", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    font = next((name for name in _FONTS if name in installed), None)
    if font is None:
        return

    rng = np.random.default_rng(seed)
    rows = [*_some(captioned, rng, 4, "描述"), *_some(asked, rng, 8), *_some(digits, rng, 4)]
    pyplot.rcParams["font.sans-serif"] = [font]
    figure, axes = pyplot.subplots(4, 4, figsize=(11, 9.2))
    for axis, (case, question) in zip(axes.flat, rows, strict=False):
        picture = next(v for v in case.record.values() if isinstance(v, bytes))
        axis.imshow(np.asarray(open_image(picture)))
        axis.set_axis_off()
        good = case.answer in case.references or same_caption(case)
        text = _wrapped(case.answer)
        axis.set_title(f"{_wrapped(question)}\n{text}", fontsize=9, color="#1a6b2d" if good else "#b00020")
    figure.tight_layout()
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def same_caption(case: Case) -> bool:
    return "caption" in case.record and same_attributes(case.answer, case.references[0])


def _some(cases: list[Case], rng: np.random.Generator, count: int, question: str = "") -> Iterable[tuple[Case, str]]:
    for index in rng.permutation(len(cases))[:count]:
        yield cases[index], question or str(cases[index].record["question"])


def _wrapped(text: str, width: int = 17) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))
