"""The hash of data: it follows their content alone, and costs one reading."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from openm6.data.source import open_source
from tests.data.conftest import picture_bytes


def written(file: Path, rows: list[dict]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return open_source(file).content_hash()


def test_equal_records_have_one_hash_in_any_file(tmp_path: Path) -> None:
    rows = [{"text": "很好", "label": "好", "n": 1}, {"text": "很差", "label": "差", "n": 2}]
    first = written(tmp_path / "a.jsonl", rows)
    assert first == written(tmp_path / "b/c.jsonl", [dict(reversed(row.items())) for row in rows])
    (tmp_path / "d.json").write_text(json.dumps(rows), "utf-8")
    assert open_source(tmp_path / "d.json").content_hash() == first
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert open_source(tmp_path / "a.jsonl").content_hash() == first


@pytest.mark.parametrize(
    "changed",
    [
        [{"text": "很好", "label": "差"}, {"text": "很差", "label": "差"}],
        [{"text": "很差", "label": "差"}, {"text": "很好", "label": "好"}],
        [{"text": "很好", "label": "好"}, {"text": "很差", "label": "差"}, {"text": "很差", "label": "差"}],
        [{"text": "很好", "class": "好"}, {"text": "很差", "label": "差"}],
        [{"text": "很好", "label": ["好"]}, {"text": "很差", "label": "差"}],
    ],
)
def test_any_other_value_order_or_name_has_another_hash(tmp_path: Path, changed: list[dict]) -> None:
    file = tmp_path / "a.jsonl"
    before = written(file, [{"text": "很好", "label": "好"}, {"text": "很差", "label": "差"}])
    assert written(file, changed) != before


def test_a_number_is_no_text(tmp_path: Path) -> None:
    assert len({written(tmp_path / "a.jsonl", [{"n": n}]) for n in (1, "1", 1.0, True)}) == 4


def test_a_picture_counts_by_its_content_and_not_by_its_time(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(picture_bytes(1))
    hashes = [written(tmp_path / "a.jsonl", [{"image": "p.png", "more": [{"image": "p.png"}]}])]
    os.utime(picture, ns=(1, 1))
    hashes.append(open_source(tmp_path / "a.jsonl").content_hash())
    other = picture_bytes(2)
    assert len(other) == picture.stat().st_size
    picture.write_bytes(other)
    hashes.append(open_source(tmp_path / "a.jsonl").content_hash())
    picture.unlink()
    hashes.append(open_source(tmp_path / "a.jsonl").content_hash())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_some_of_the_records_have_a_hash_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": str(n)} for n in range(4)]
    whole, part = written(tmp_path / "a.jsonl", rows), open_source(tmp_path / "a.jsonl", limit=2).content_hash()
    assert part != whole == open_source(tmp_path / "a.jsonl", limit=9).content_hash()
    assert part == written(tmp_path / "b.jsonl", rows[:2])


def test_the_hash_is_computed_once_and_then_read(tmp_path: Path, cache: Path) -> None:
    first = written(tmp_path / "a.jsonl", [{"text": "一"}])
    [kept] = cache.glob("*/content.json")
    kept.write_text(kept.read_text("utf-8").replace(first, "f" * 64), "utf-8")
    assert open_source(tmp_path / "a.jsonl").content_hash() == "f" * 64
    kept.write_text("{", "utf-8")
    assert open_source(tmp_path / "a.jsonl").content_hash() == first


def test_generated_data_are_known_by_their_name() -> None:
    hashes = [open_source(f"demo:texts/train?pictures={n}").content_hash() for n in (5, 5, 6)]
    assert hashes[0] == hashes[1] != hashes[2]
