"""A version takes the place of another for a gain that is more than chance, on records that it was not trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.data.store import ListRecords
from openm6.tasks.library import get
from openm6.train.promotion import check_apart, gain, not_trained_on, reason_against
from tests.tasks.conftest import picture

VQA = get("vqa")


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    """Questions about pictures, with paths."""
    made = []
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(picture(16, 16, seed=number))
        made.append({"photo": f"{number}.jpg", "question": f"{number}是什么?", "answer": "红色"})
    return made


def _file(folder: Path, name: str, records: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(folder / name)


def test_records_of_the_calibration_are_not_trained_on(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    known = _file(tmp_path, "known.jsonl", records[:4])
    calibration = open_source(known)
    shutil.copy(tmp_path / "2.jpg", tmp_path / "copy.jpg")
    renamed = [{"图片": "copy.jpg", "问题": records[2]["question"], "答案": "蓝色"}]
    for name, found, first in (
        ("known.jsonl", 4, "known.jsonl:1"),
        (_file(tmp_path, "other-name.jsonl", records[:4]), 4, "known.jsonl:1"),
        (_file(tmp_path, "partly.jsonl", records[3:]), 1, "known.jsonl:4"),
        (_file(tmp_path, "renamed.jsonl", renamed), 1, "known.jsonl:3"),
    ):
        with pytest.raises(UsageError, match=f"has {found} of the 4 records that vqa was calibrated with.*{first}"):
            check_apart(VQA, calibration, {}, [str(tmp_path / name)])
    check_apart(VQA, calibration, {}, [_file(tmp_path, "others.jsonl", records[4:])])


def test_held_out_answers_that_are_trained_on_are_not_measured(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    trained_on = _file(tmp_path, "train.jsonl", records[:3])
    kept = ListRecords({**record, "photo": (tmp_path / record["photo"]).read_bytes()} for record in records)
    left = not_trained_on(VQA, kept, [trained_on])
    assert [left[number]["question"] for number in range(len(left))] == [one["question"] for one in records[3:]]
    assert len(not_trained_on(VQA, kept, [])) == 8 and len(not_trained_on(VQA, ListRecords([]), [trained_on])) == 0


def _exact(improved: int, worsened: int) -> float:
    """The binomial sum itself."""
    from math import comb

    count = improved + worsened
    return sum(comb(count, one) for one in range(improved, count + 1)) / 2**count


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=60))
def test_the_chance_is_that_of_mcnemars_exact_test(pairs: list[tuple[int, int]]) -> None:
    before, after = (np.array([pair[side] for pair in pairs], float) for side in (0, 1))
    found = gain(before, after)
    assert (found["improved"], found["worsened"]) == (pairs.count((0, 1)), pairs.count((1, 0)))
    assert found["chance"] == pytest.approx(_exact(found["improved"], found["worsened"]))


def _measured(improved: int, worsened: int, same: int, **calibration: float) -> dict[str, Any]:
    before = np.repeat([0.0, 1.0, 1.0], [improved, worsened, same])
    after = np.repeat([1.0, 0.0, 1.0], [improved, worsened, same])
    return {"tasks": {"vqa": {"held_out": len(before), **calibration}}, **gain(before, after)}


def test_few_answers_cannot_show_a_gain() -> None:
    assert "Of 4 answers that were held out 4 are better and 0 worse, which may be chance (p = 0.06" in reason_against(
        _measured(4, 0, 0)
    )
    assert reason_against(_measured(5, 0, 0)) == ""
    assert "Of 20 answers" in reason_against(_measured(6, 2, 12))
    assert reason_against(_measured(60, 20, 120)) == ""
    assert "Of 0 answers that were held out 0 are better" in reason_against(_measured(0, 0, 0))


def test_what_is_lost_on_the_calibration_counts_against_a_gain() -> None:
    assert reason_against(_measured(9, 0, 9, before=0.98, after=0.97)) == ""
    assert "3.0% fewer of the calibration's records of vqa right; 1% is allowed" in reason_against(
        _measured(9, 0, 9, before=0.98, after=0.95)
    )
