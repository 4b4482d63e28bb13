"""The demo from end to end, with a network too small and too short to learn: what it leaves, not how good it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest

from openm6.evaluate.demo import gaps_filled
from openm6.inference.session import Session
from tests.train.conftest import SIZES


@pytest.mark.slow
def test_a_filled_gap_keeps_the_rest_and_has_a_colour() -> None:
    class Answers:
        """Stands for a Session: gives each sentence back with the gap filled by one of these in turn."""

        fillings = ("红色", "条纹", "红色的", "")

        def run_many(self, task: str, records: Iterable[dict[str, str]]) -> Iterator[str]:
            for number, record in enumerate(records):
                yield record["text"].replace("____", self.fillings[number % 4])

    right = gaps_filled(cast(Session, Answers()), limit=40)
    assert len(right) == 40
    assert right == [1.0, 0.0, 0.0, 0.0] * 10


@pytest.mark.slow
def test_the_demo_trains_measures_and_reports(tmp_path: Path) -> None:
    sizes = [f"model.sizes.{key}={json.dumps(value)}" for key, value in SIZES.items()]
    names = ("product_attributes", "vqa", "caption", "infilling")
    views = ("items", "questions", "catalogue", "texts")
    data = [{"source": f"demo:{v}/train?pictures=60", "task": n} for n, v in zip(names, views, strict=True)]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("openm6")), "demo", "--output", "out", "--json", *sizes,
         f"data={json.dumps(data)}", "train.steps=3", "train.batch_size=8", "train.log_every=1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    names = [figure["name"] for figure in found["figures"]]
    assert "colour, one object" in names
    assert "handwritten digit" in names
    assert "gap in a sentence filled, the rest unchanged" in names
    assert all(0 <= f["low"] <= f["value"] <= f["high"] <= 1 and f["n"] >= 100 for f in found["figures"])
    page = (tmp_path / found["report"]).read_text("utf-8")
    assert page.count("<img") >= 10
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text("utf-8"))
    assert [e["task"] for e in report["evaluations"]] == ["vqa", "caption", "vqa", "infilling"]
