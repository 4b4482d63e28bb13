"""M6-UFC: does drawing with the two estimates give better pictures, and in how many passes?

Draws with the model that `make demo-images` leaves, for combinations it has never seen; its judge counts the pictures
that show all attributes asked for.
"""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine
from openm6.core.errors import UsageError
from openm6.evaluate.demo_images import DATA, TASK
from openm6.evaluate.pictures import Judge, as_square, frechet, judged, read_prompts
from openm6.inference.session import Session
from reproduce.common import ROOT, SCALES, Scale, verdict

TITLE = "Progressive drawing"
MODEL = ROOT / "runs" / "demo-images"
BRANCHES, SEEDS = 4, 3
PASSES = {"tiny": (1, 2), "small": (2, 4, 8, 16), "large": (2, 4, 8, 12, 16, 24)}
ASKED = {"tiny": 8, "small": 200, "large": 700}

WAYS: dict[str, dict[str, float]] = {
    "mask-predict": {},
    f"mask-predict, best of {BRANCHES}": {"candidates": BRANCHES, "reading": 0},
    "progressive, relevance": {"branches": BRANCHES, "fidelity": 0},
    "progressive, fidelity": {"branches": BRANCHES, "relevance": 0},
    "progressive, both": {"branches": BRANCHES},
}
"""Options of drawing. The second way draws as many codes as the progressive ones, and chooses at the end alone."""

INTRO = (
    "M6-UFC (NeurIPS 2021, arXiv 2105.14211, section 3.2) draws several pictures in every pass, lets two estimates of "
    "the same network (relevance: does it show what was asked for; fidelity: does it look real) choose one, and draws "
    "its least sure codes again. Here against plain mask-predict (MaskGIT's order), against as many pictures drawn "
    "apart of which the estimates choose one at the end, and against all codes in one pass."
)


def run(scale: Scale, folder: Path, out: Path, model: Path = MODEL) -> Path:
    """Draw in every way, several seeds, and write the page."""
    name = next(name for name, one in SCALES.items() if one is scale)
    if not (model / "model").is_dir():
        raise UsageError(f"{model} holds no model that draws: run `make demo-images` first.")
    session, judge = Session.load(model / "model"), Judge(Session.load(model / "judge" / "model"))
    records, wanted = read_prompts(session, TASK, judge, DATA, ASKED[name])
    real = judge.features([as_square(record["picture"], session.codec.size) for record in records])
    asked = [{"caption": record["caption"]} for record in records]

    def drawn(options: dict[str, float], passes: int, seed: int) -> dict[str, float]:
        options = {**options, "passes": passes, "seed": seed}
        candidates, started = int(options.pop("candidates", 1)), time.perf_counter()
        some = [s[0].image for s in session.draw_many(TASK, asked, candidates=candidates, decoding=options)]
        seconds = time.perf_counter() - started
        right = [row["all"] for row in judged(judge, some, wanted)]
        return {
            "all": sum(right) / len(right), "frechet": frechet(real, judge.features(some)),
            "ms": 1000 * seconds / len(some),
        }  # fmt: skip

    rows: list[dict[str, Any]] = []
    for way, options in {"one pass": {}, **WAYS}.items():
        for passes in (1,) if way == "one pass" else PASSES[name]:
            found = [drawn(options, passes, seed) for seed in range(SEEDS)]
            rows.append({"way": way, "passes": passes, **{key: [f[key] for f in found] for key in found[0]}})
            print(f"{way}, {passes} passes: {median(rows[-1]['all']):.1%} show all attributes", flush=True)
    return _page(rows, len(asked), out)


def _page(rows: list[dict[str, Any]], asked: int, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    most = max(row["passes"] for row in rows)
    last = {row["way"]: row["all"] for row in rows if row["passes"] in (most, 1)}
    plain, apart, relevance, fidelity, both = (last[way] for way in WAYS)
    findings = [
        ("Passes beat one pass", plain, last["one pass"]),
        ("Progressive drawing with both estimates beats mask-predict", both, plain),
        ("It beats choosing at the end among as many pictures", both, apart),
        ("Both estimates beat relevance alone", both, relevance),
        ("Both estimates beat fidelity alone", both, fidelity),
    ]
    lines = [f"# {TITLE}", "", INTRO, "", "![Quality by passes](progressive.png)", "", "## What holds here", ""]
    lines += ["| claim | here | figures |", "| --- | --- | --- |"]
    lines += [f"| {c} | {verdict(a, b)} | {median(a):.1%} against {median(b):.1%} |" for c, a, b in findings]
    lines += ["", "## Figures", "", "| way | passes | all attributes (lowest to highest) | Fréchet | ms a picture |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['way']} | {r['passes']} | {median(r['all']):.1%} ({min(r['all']):.1%} to {max(r['all']):.1%}) "
        f"| {median(r['frechet']):.2f} | {median(r['ms']):.0f} |"
        for r in rows
    ]
    lines += [
        "",
        f"{asked} captions of combinations that no training picture had, {SEEDS} seeds of drawing; claims at {most} "
        "passes, progressive drawing may have stopped before. All attributes: pictures in which the judge reads the "
        "category, colour and pattern asked for; Fréchet distance on its features.",
        "",
        f"Made by `openm6 reproduce progressive` on {machine()}, {date.today().isoformat()}.",
        "",
    ]
    _draw(rows, out / "progressive.png")
    page = out / "progressive.md"
    page.write_text("\n".join(lines), "utf-8")
    rounded = json.loads(json.dumps(rows), parse_float=lambda text: float(f"{float(text):.5g}"))
    (out / "progressive.json").write_text(json.dumps(rounded) + "\n", "utf-8")
    return page


def _draw(rows: list[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, label in zip(axes, ("all", "frechet"), ("all attributes right", "Fréchet distance"), strict=True):
        axis.axhline(median(rows[0][key]), color="grey", ls=":", lw=1, label="one pass")
        for number, way in enumerate(WAYS):
            own = [row for row in rows if row["way"] == way]
            passes = [row["passes"] for row in own]
            axis.plot(passes, [median(row[key]) for row in own], "o-", ms=3, lw=1.3, color=f"C{number}", label=way)
            low, high = [min(row[key]) for row in own], [max(row[key]) for row in own]
            axis.fill_between(passes, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axis.set(xlabel="passes", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
