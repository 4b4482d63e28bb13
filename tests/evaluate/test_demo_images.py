"""The report on the demo's pictures, on untrained models and a judge that looks at the pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6.evaluate import demo_images
from openm6.evaluate.demo_images import draw_own, measure_controls, measure_edits, report_images
from openm6.evaluate.pictures import Judge
from openm6.inference.session import Session
from openm6.tasks.encode import encode_example
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS
from tests.conftest import drawing_session

BUNDLE = drawing_session()


class Reader(Judge):
    """Says of every picture the same, and keeps what it was shown."""

    def __init__(self, answer: dict[str, str]):
        super().__init__(BUNDLE, "product_attributes")
        self.answer, self.shown = answer, []

    def read(self, pictures: Any, given: Any = None) -> list[Any]:
        self.shown += [np.asarray(p) for p in pictures]
        return [self.answer for _ in pictures]


def test_edits_keep_what_they_do_not_touch_and_count_what_the_judge_sees() -> None:
    judge = Reader({"category": CATEGORIES[0], "colour": "红色", "pattern": PATTERNS[0]})
    found = measure_edits(BUNDLE, judge, count=12)
    assert found["kept"] == 1.0
    assert len(judge.shown) == 12
    assert found["changed"] == pytest.approx(np.mean([found[name] for name in ("category", "colour", "pattern")]))
    assert 0 <= found["all"] <= found["changed"] < 1


def test_an_edit_that_touches_what_it_should_keep_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo_images.edit

    def clumsy(*arguments: Any, **options: Any) -> Any:
        best = real(*arguments, **options)
        pixels = np.asarray(best[0].image).copy()
        pixels[0, 0] ^= 1
        pixels[-1, -1] ^= 1
        best[0] = type(best[0])(Image.fromarray(pixels), 0, best[0].codes, best[0].estimates, best[0].score)
        return best

    monkeypatch.setattr(demo_images, "edit", clumsy)
    judge = Reader({"category": CATEGORIES[0], "colour": "红色", "pattern": PATTERNS[0]})
    assert measure_edits(BUNDLE, judge, count=12)["kept"] < 0.5


def test_a_control_is_measured_alone_and_against_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that always says red: of captions and of controls those count that ask for red."""
    monkeypatch.setattr(demo_images, "DATA", "demo:studio/test?pictures=60")
    judge = Reader({"category": CATEGORIES[0], "colour": "红色", "pattern": PATTERNS[0]})
    found = measure_controls(BUNDLE, judge, count=20)
    assert found.keys() == {"style", "sketch", "reference"}
    assert found["style"].keys() == {"colour", "pattern"} and found["sketch"].keys() == {"category"}
    from openm6.data.source import open_source

    source = open_source(demo_images.DATA)
    pairs = [(source[i], source[(i + 30) % 60]) for i in range(60)]
    pairs = [(a, b) for a, b in pairs if all(a[n] != b[n] for n in ("category", "colour", "pattern"))][:20]
    ours, theirs = (np.mean([pair[side]["colour"] == "红色" for pair in pairs]) for side in (0, 1))
    assert found["style"]["colour"] == (pytest.approx(theirs), pytest.approx(ours), pytest.approx(theirs))


def test_own_pictures_are_codes_that_are_not_real(tmp_path: Path) -> None:
    session = drawing_session()
    session.tasks["caption"] = session.task("caption")  # it can read
    session.save(tmp_path / "model")
    file = draw_own(tmp_path / "model", "demo:studio/train?pictures=6", tmp_path / "own", count=5)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert len(rows) == 5 * demo_images.EACH and all(row["verdict_fidelity"] == 0 for row in rows)
    for start in range(0, len(rows), demo_images.EACH):
        some = rows[start : start + demo_images.EACH]
        assert len({row["caption"] for row in some}) == 1
        assert sorted(row.get("verdict_relevance", 2) for row in some) == [0, 1, *[2] * (demo_images.EACH - 2)]
    task = BUNDLE.task("text_to_image")
    for row in rows:
        assert len(row["picture"]) == BUNDLE.codec.side**2
        assert len(encode_example(task, row, BUNDLE.processor)) > BUNDLE.codec.side**2
    stamp = file.stat().st_mtime_ns
    assert draw_own(tmp_path / "model", "demo:studio/train?pictures=6", tmp_path / "own") == file
    assert file.stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_the_report_has_all_tables_and_the_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"ASKED": 14, "CANDIDATES": 2, "EDITS": 3, "DATA": "demo:studio/test?pictures=40"}.items():
        monkeypatch.setattr(demo_images, name, value)
    monkeypatch.setattr(demo_images, "measure_controls", lambda *_: {"style": {"colour": (0.9, 0.75, 0.25)}})
    session = drawing_session()
    task = session.task("product_attributes").with_labels(
        {"category": CATEGORIES, "colour": tuple(c + "色" for c in COLOURS), "pattern": PATTERNS}
    )
    judge = Session(session.model, session.processor, [task])
    session.save(tmp_path / "model")
    judge.save(tmp_path / "judge")
    found = report_images(tmp_path / "model", tmp_path / "judge", tmp_path / "out")
    assert found["rows"].keys() == {"real", "reconstructed", "drawn", "8 passes", "best of 2"}
    assert found["edits"]["kept"] == 1.0
    text = (tmp_path / "out" / "report" / "report.md").read_text("utf-8")
    assert "| style | colour | 90% | 75% | 25% |" in text and "best of 2" in text
    assert (tmp_path / "out" / "report" / "pictures" / "drawn.png").is_file()
