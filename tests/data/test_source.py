import json
import os
from pathlib import Path
from typing import Any

import pytest

from openm6.core.errors import DataError, UsageError
from openm6.core.images import open_image
from openm6.data.columns import SlotView
from openm6.data.rejects import Rejects
from openm6.data.source import open_source
from openm6.tasks.library import get
from tests.data.conftest import picture_bytes, source_package


def lines(path: Path, count: int, bad: int = 0) -> Path:
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(count)) + "{\n" * bad, "utf-8")
    return path


def test_records_are_reached_in_any_order_with_their_columns(tmp_path: Path) -> None:
    source = open_source(lines(tmp_path / "a.jsonl", 10))
    assert (len(source), source.columns) == (10, ("text",))
    assert [source[i]["text"] for i in (9, 0, -1)] == ["9", "0", "9"]
    assert [r["text"] for r in source] == [str(i) for i in range(10)]
    assert len(open_source(tmp_path / "a.jsonl", limit=3)) == 3


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path: Path, cache: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 3)
    open_source(path)
    made = {p for p in cache.iterdir() if p.is_dir()}
    open_source(path)
    assert {p for p in cache.iterdir() if p.is_dir()} == made
    lines(path, 5)
    assert len(open_source(path)) == 5
    os.utime(path, ns=(1, 1))
    assert len(open_source(path)) == 5
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 3


def test_a_relative_folder_of_pictures_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fold").mkdir()
    (tmp_path / "fold" / "a.png").write_bytes(picture_bytes(1))
    (tmp_path / "fold" / "a.txt").write_text("一", "utf-8")
    (tmp_path / "fold" / "b.jsonl").write_text('{"image": "a.png", "text": "一"}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("fold", str(tmp_path / "fold"), "fold/b.jsonl", str(tmp_path / "fold/b.jsonl")):
        monkeypatch.chdir(tmp_path)
        source = open_source(name)
        assert str(source[0]["_where"]).startswith(name)
        monkeypatch.chdir("/")
        assert open_image(Path(source[0]["_root"]) / source[0]["image"]).size == (8, 8)


def test_a_file_that_was_replaced_with_its_old_time_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "0"}\n')
    before = path.stat()
    assert open_source(path)[0]["text"] == "0"
    path.write_text('{"text": "1"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_source(path)[0]["text"] == "1"


def test_without_the_cache_nothing_is_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENM6_NO_CACHE", "1")
    assert len(open_source(lines(tmp_path / "a.jsonl", 3))) == 3
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "你好"}]},
        {"id": 1, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>?"}]},
        {"instruction": "翻译", "input": "", "output": "translate"},
    ],
)  # fmt: skip
def test_conversations_are_named_as_such_where_a_slot_has_no_column(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for task in ("caption", "text_classification"):
        with pytest.raises(UsageError, match=r"hold conversations .* which the task chat reads\. The task .* needs"):
            SlotView.of(get(task), open_source(tmp_path / "a.jsonl"))


def test_conversations_beside_columns_that_are_named_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps(
            {"instruction": "很好", "input": "", "output": "正面", "messages": [{"role": "user", "content": "a"}]}
        )
    )
    columns = {"text": "instruction", "label": "output"}
    source = open_source(tmp_path / "a.jsonl")
    view = SlotView.of(get("text_classification"), source, columns)
    assert (view(source[0])["text"], view(source[0])["label"]) == ("很好", "正面")


def test_columns_that_only_sound_like_conversations_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": ["一", "二"], "instruction": "a"}))
    assert open_source(tmp_path / "a.jsonl")[0]["messages"] == ["一", "二"]


def test_an_empty_data_set_is_an_error_that_names_it_and_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl holds no usable record\.$"):
        open_source(lines(tmp_path / "a.jsonl", 0))
    with pytest.raises(DataError, match=r"no usable record: .*b\.jsonl:1 is not valid JSON"):
        open_source(lines(tmp_path / "b.jsonl", 0, bad=2))


def test_bad_rows_are_counted_also_when_they_come_from_the_cache(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 97, bad=3)
    for number in range(2):
        rejects = Rejects(tmp_path / f"{number}.jsonl")
        source = open_source(path, rejects=rejects)
        assert (len(source), rejects.bad, rejects.seen) == (97, 3, 100)
        assert source.rejected[0].where == f"{path}:98"
    with pytest.raises(DataError, match="of 35 records"):
        open_source(lines(tmp_path / "b.jsonl", 10, bad=30), rejects=Rejects(tmp_path / "r.jsonl", minimum=25))


def test_the_built_in_sources() -> None:
    assert open_source("demo:catalogue/train?pictures=5&seed=1").columns[0] == "image"
    assert len(open_source("demo:catalogue/test?pictures=5")) == 5
    assert open_source("demo:questions/train?pictures=5")[0]["image"][:2] == b"\xff\xd8"
    assert "text" in open_source("demo:texts/validation?pictures=5").columns
    assert len(open_source("digits/test")) + len(open_source("digits/train")) == 1797


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("demo:katalogue/train", "no part"), ("demo:catalogue/dev", "no split"), ("digits/dev", "no split"),
        ("demo:catalogue/train?pictures=x", "whole numbers"),
        ("demo:catalogue/train?colour=red", "unknown option colour"),
    ],
)  # fmt: skip
def test_unknown_built_ins_are_usage_errors(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        open_source(name)


def test_only_parquet_is_streamed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only Parquet"):
        open_source(lines(tmp_path / "a.jsonl", 3), stream=True)
    with pytest.raises(UsageError, match="not streamed"):
        open_source("digits/train", stream=True)


def test_an_installed_package_brings_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_package(tmp_path / "package", "mine", monkeypatch).records.extend({"text": str(n)} for n in range(5))
    assert [record["text"] for record in open_source("mine:all", limit=3)] == ["0", "1", "2"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    lines(tmp_path / "mine" / "a.jsonl", 2)
    assert len(open_source("mine/a.jsonl")) == 2  # a file that is there
