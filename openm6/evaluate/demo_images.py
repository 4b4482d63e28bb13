"""The demo's pictures: drawn for combinations of category, colour and pattern that no training picture had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from openm6.atomic import write_whole
from openm6.bundle import Bundle
from openm6.data.source import open_source
from openm6.evaluate.pictures import Judge, draw_sheet, measure_drawing, read_wishes
from openm6.evaluate.report import write_pictures

TASK = "text_to_image"
DATA = "demo:items/test"
ASKED = 400
CANDIDATES = 8
OWN = 1500
"""Of its own pictures a model learns from, as what is not real."""


def draw_own(model: Path, data: str, target: Path, count: int = OWN) -> Path:
    """Write pictures of the model itself, as codes, with the verdict that they are not real, into a folder; returns the
    file."""
    if target.is_dir():
        return target / "own.jsonl"
    bundle = Bundle.load(model)
    source = open_source(data)
    texts = [str(_first(source[i]["caption"], i)) for i in range(min(count, len(source)))]

    def lines() -> Iterator[str]:
        drawn = bundle.draw_many(TASK, ({"caption": text} for text in texts), decoding={"seed": 1})
        for text, some in zip(texts, drawn, strict=True):
            line = {"caption": text, "picture": some[0].codes.tolist(), "verdict_fidelity": 0}
            yield json.dumps(line, ensure_ascii=False) + "\n"

    def write(folder: Path) -> None:
        (folder / "own.jsonl").write_text("".join(lines()), "utf-8")

    write_whole(target, write)
    return target / "own.jsonl"


def report_images(model: Path, judge: Path, output: Path) -> dict[str, Any]:
    """Measure what the demo's model draws, and write `output/report`.

    Returns {"rows": {"real": {measure: value}, "reconstructed": ..., "drawn": ..., "best of 8": ...}, "report": path}.
    """
    bundle, judging = Bundle.load(model), Judge(Bundle.load(judge))
    records, wanted = read_wishes(bundle, TASK, judging, DATA)
    records, wanted = records[:ASKED], wanted[:ASKED]
    rows, best = measure_drawing(bundle, TASK, judging, records, wanted, CANDIDATES)
    folder = output / "report"
    draw_sheet(best, folder / "pictures" / "drawn.png")
    captions = [str(record["caption"]) for record in records]
    shown = list(islice(zip(captions, best, strict=True), 24))
    page = write_pictures(folder, "Drawn by OpenM6", _INTRO, rows, shown)
    return {"rows": rows, "report": str(page)}


_INTRO = (
    f"Every picture was drawn for a combination of category, colour and pattern that no training picture had: the best "
    f"of {CANDIDATES} by the model's own estimates. A judge, a small model of its own trained on real pictures alone, "
    "says what it reads in them; what it reads in real pictures, and in those that only went through the codec, stands "
    "beside."
)


def _first(captions: Any, number: int) -> Any:
    """Another wording each time."""
    return captions[number % len(captions)] if isinstance(captions, list) else captions
