"""Evaluation and report of the demo's image generation, on unseen combinations of category, colour and pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.files import dumps, write_whole
from openm6.core.images import read_square
from openm6.data.source import open_source
from openm6.evaluate.pictures import Judge, compared, draw_sheet, judged, measure_drawing, read_prompts
from openm6.evaluate.report import markdown_table, write_pictures
from openm6.inference.edit import edit
from openm6.inference.session import Session
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, STUDIO, Placed, draw_picture
from openm6.worlds.phrases import captions
from openm6.worlds.pictured import HELD_OUT

TASK = "text_to_image"
DATA = "demo:studio/test"
ASKED = 400
CANDIDATES = 8
EDITS = 200
ATTRIBUTES = ("category", "colour", "pattern")
VALUES = {"category": CATEGORIES, "colour": tuple(COLOURS), "pattern": PATTERNS}
OWN, EACH = 400, 4
"""Number of captions for which a model draws its own training pictures, and of pictures per caption."""


def draw_own(model: Path, data: str, target: Path, count: int = OWN) -> Path:
    """Write pictures drawn by the model, as codes with verdicts, into a folder as training data for its estimators.
    Returns the file.

    All have fidelity 0. For each caption the picture from which the model would most likely write that caption is
    labelled relevant, the least likely one irrelevant: trained on real pictures only, the estimator finds everything
    that the model draws relevant.
    """
    if target.is_dir():
        return target / "own.jsonl"
    session = Session.load(model)
    source = open_source(data)
    texts = [str(_first(source[i]["caption"], i)) for i in range(min(count, len(source)))]

    def lines() -> Iterator[str]:
        prompts = ({"caption": text} for text in texts)
        drawn = session.draw_many(TASK, prompts, candidates=EACH, decoding={"seed": 1})
        for text, some in zip(texts, drawn, strict=True):
            worst, *_, best = sorted(range(EACH), key=lambda number: some[number].estimates["reading"])
            for number, one in enumerate(some):
                line = {"caption": text, "picture": one.codes.tolist(), "verdict_fidelity": 0}
                if number in (worst, best):
                    line["verdict_relevance"] = int(number == best)
                yield dumps(line) + "\n"

    def write(folder: Path) -> None:
        (folder / "own.jsonl").write_text("".join(lines()), "utf-8")

    write_whole(target, write)
    return target / "own.jsonl"


def report_images(model: Path, judge: Path, output: Path) -> dict[str, Any]:
    """Evaluate the pictures of the demo's model and write `output/report`.

    Returns {"rows": {"real": {measure: value}, "reconstructed": ..., "drawn": ..., "best of 8": ...}, "edits": see
    `measure_edits`, "controls": see `measure_controls`, "report": path}.
    """
    session, judging = Session.load(model), Judge(Session.load(judge))
    records, wanted = read_prompts(session, TASK, judging, DATA, ASKED)
    others = {"8 passes": {"passes": 8}}
    rows, best = measure_drawing(session, TASK, judging, records, wanted, CANDIDATES, others=others)
    folder = output / "report"
    draw_sheet(best, folder / "pictures" / "drawn.png")
    texts = [str(record["caption"]) for record in records]
    shown = list(islice(zip(texts, best, strict=True), 24))
    edits = measure_edits(session, judging)
    summary = (
        f"{EDITS} edits of one attribute: pixels outside the mask unchanged in {edits['kept']:.1%}, attribute changed "
        f"in {edits['changed']:.1%} (category {edits['category']:.1%}, colour {edits['colour']:.1%}, pattern "
        f"{edits['pattern']:.1%})."
    )
    controls = measure_controls(session, judging)
    intro = f"{_INTRO}\n\n{summary}\n\n{_controls_table(controls)}"
    page = write_pictures(folder, "Drawn by OpenM6", intro, rows, shown)
    return {"rows": rows, "edits": edits, "controls": controls, "report": str(page)}


def measure_edits(session: Session, judge: Judge, count: int = EDITS, seed: int = 0) -> dict[str, float]:
    """Edit one attribute of pictures with an item at a known place: its bounding box is redrawn after a caption that
    differs in that attribute.

    Returns fractions of the edits: `kept`, with all pixels outside the mask unchanged; `changed`, in which the judge
    reads the new attribute; `all`, in which it also reads the two others unchanged; and `changed` by attribute.
    """
    rng = np.random.default_rng(seed)
    codec = session.codec
    held_out = sorted(HELD_OUT, key=str)
    kept, wanted, asked, results = [], [], [], []
    for number in range(count):
        item = held_out[rng.integers(len(held_out))]
        name = ATTRIBUTES[number % len(ATTRIBUTES)]
        others = [value for value in VALUES[name] if value != getattr(item, name)]
        target = replace(item, **{name: others[rng.integers(len(others))]})
        size = rng.uniform(0.6, 0.8)
        x, y = rng.uniform(size / 2, 1 - size / 2, 2)
        picture = read_square(draw_picture([Placed(item, x, y, size)], rng, STUDIO), codec.size)
        mask = np.zeros(picture.shape[:2], bool)
        left, top, right, bottom = (
            round(v * codec.size) for v in (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
        )
        mask[max(0, top) : bottom, max(0, left) : right] = True
        text = captions((target,), "", rng)[0]
        edited = edit(session, TASK, picture, mask, candidates=4, decoding={"seed": number}, caption=text)[0].image
        kept.append(bool((np.asarray(edited)[~mask] == picture[~mask]).all()))
        wanted.append({"category": target.category, "colour": target.colour + "色", "pattern": target.pattern})
        asked.append(name)
        results.append(edited)
    rows = judged(judge, results, wanted)
    changed = [row[name] for row, name in zip(rows, asked, strict=True)]
    found = {"kept": float(np.mean(kept)), "changed": float(np.mean(changed))}
    found["all"] = float(np.mean([row["all"] for row in rows]))
    for name in ATTRIBUTES:
        found[name] = float(np.mean([c for c, a in zip(changed, asked, strict=True) if a == name]))
    return found


CONTRADICTIONS = {"style": ("colour", "pattern"), "sketch": ("category",), "reference": ATTRIBUTES}
"""Attributes determined by each control of `controlled_image`, which a caption may contradict."""


def measure_controls(session: Session, judge: Judge, count: int = 100) -> dict[str, dict[str, tuple[float, ...]]]:
    """Measure how well pictures follow a control, alone and against a caption of an item that differs in every
    attribute.

    Returns {control: {attribute: (a, b, c)}} for the attributes of each control: the fraction of pictures that follow
    (a) the control alone, (b) the caption against the control, (c) the control against the caption.
    """
    source = open_source(DATA)
    every = ((source[i], source[(i + len(source) // 2) % len(source)]) for i in range(len(source)))
    unlike = (pair for pair in every if all(pair[0][name] != pair[1][name] for name in ATTRIBUTES))
    captioned, shown = zip(*islice(unlike, count), strict=True)
    found = {}
    for control, names in CONTRADICTIONS.items():
        alone = [{control: one[control]} for one in shown]
        against = [
            {"caption": _first(a["caption"], 0), control: b[control]} for a, b in zip(captioned, shown, strict=True)
        ]
        ours, both = (_read_controlled(session, judge, asked) for asked in (alone, against))
        columns = [compared(ours, shown, names), compared(both, captioned, names), compared(both, shown, names)]
        found[control] = {name: tuple(float(np.mean([row[name] for row in c])) for c in columns) for name in names}
    return found


def _read_controlled(session: Session, judge: Judge, asked: list[dict[str, Any]]) -> Any:
    return judge.read(list(session.run_many("controlled_image", asked, decoding={"seed": 2})))


def _controls_table(found: dict[str, dict[str, tuple[float, ...]]]) -> str:
    rows = [
        (control, name, *(f"{share:.0%}" for share in shares))
        for control, several in found.items()
        for name, shares in several.items()
    ]
    said = "Pictures that follow a control alone and, given a contradicting caption, the caption or the control:"
    heads = ("control", "attribute", "control alone", "caption against control", "control against caption")
    return f"{said}\n\n{markdown_table(heads, rows)}"


_INTRO = (
    f"Every picture was drawn for a combination of category, colour and pattern that was in no training picture: the "
    f"best of {CANDIDATES} by the model's own estimates. A judge, a small model trained on real pictures only, reads "
    "their attributes; real pictures, and those reconstructed by the codec, are listed for comparison."
)


def _first(captions: Any, number: int) -> Any:
    """One of the wordings of a caption, a different one for each number."""
    return captions[number % len(captions)] if isinstance(captions, list) else captions
