"""An index filled by a model and asked by the real commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.errors import ContextLengthError, UsageError
from openm6.inference.request import Request
from openm6.inference.session import Session
from openm6.retrieve import Index, fill
from openm6.train.trainer import train
from tests.conftest import command
from tests.tasks.conftest import picture
from tests.train.conftest import tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = [{"source": "demo:items/train?pictures=20", "task": "text_vector", "against": "image_vector"}]
    return train(tiny_recipe(tmp_path_factory.mktemp("run"), data=data, steps=3, checkpoint_every=3))


@pytest.fixture
def goods(tmp_path: Path) -> Path:
    lines = []
    for number in range(24):
        (tmp_path / f"{number}.jpg").write_bytes(picture(seed=number))
        lines.append(
            {"image": f"{number}.jpg", "sku": f"A{number}", "price": number * 10, "colour": "红蓝"[number % 2]}
        )
    file = tmp_path / "goods.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    return file


def call(*words: object) -> Any:
    done = CliRunner().invoke(commands(), [*map(str, words), "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def built(model: Path, goods: Path, place: Path, *more: object) -> Any:
    return call(
        "index", "build", place, "--model", model, "--task", "image_vector", "--query-task", "text_vector",
        "--data", goods, "--id", "sku", "--keep", "price", "--keep", "colour", *more,
    )  # fmt: skip


@pytest.mark.slow
def test_goods_are_found_by_text_and_filtered(model: Path, goods: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    assert built(model, goods, place)["new"] == 24
    hits = call("index", "search", place, "text=红色的裙子", "-k", 5)
    assert len(hits) == 5 and hits[0]["id"].startswith("A") and hits[0]["score"] >= hits[1]["score"]
    session = Session.load(model)
    vectors = {f"A{n}": session.run("image_vector", photo=picture(seed=n)) for n in range(24)}
    query = session.run("text_vector", text="红色的裙子")
    best = max(vectors, key=lambda name: float(vectors[name] @ query))
    assert hits[0]["score"] == pytest.approx(float(vectors[best] @ query), abs=0.02)
    cheap = call("index", "search", place, "text=红色的裙子", "--where", "price < 50 AND colour = '蓝'")
    assert {hit["id"] for hit in cheap} == {"A1", "A3"}
    found = call("index", "search", place, f"photo={tmp_path / '7.jpg'}", "--task", "image_vector", "-k", 1)
    assert found[0]["id"] == "A7" and found[0]["score"] == pytest.approx(1, abs=0.01)
    assert call("index", "show", place)["items"] == 24


@pytest.mark.slow
def test_items_are_added_replaced_and_deleted(model: Path, goods: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    built(model, goods, place, "--dims", 8)
    (tmp_path / "new.jpg").write_bytes(picture(seed=99))
    rows = [{"image": "new.jpg", "sku": name, "price": 5, "colour": "绿"} for name in ("A3", "B1")]
    rows.append({"image": "missing.jpg", "sku": "B2", "price": 5, "colour": "绿"})
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    told = call("index", "add", place, "--data", more)
    assert (told["new"], told["replaced"]) == (1, 1) and told["items"] == 25 and "missing.jpg" in told["rejected"][0]
    found = call("index", "search", place, f"photo={tmp_path / 'new.jpg'}", "--task", "image_vector", "-k", 2)
    assert {hit["id"] for hit in found} == {"A3", "B1"} and found[0]["colour"] == "绿"
    assert call("index", "delete", place, "B1", "A0")["items"] == 23
    assert call("index", "delete", place, "--where", "price >= 100")["deleted"] == 14


def test_bad_records_are_counted_and_stand_in_a_file(model: Path, goods: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    rows = [json.loads(line) for line in goods.read_text("utf-8").splitlines()]
    rows += [rows[3], rows[5], rows[3], {**rows[0], "sku": "B1", "image": "missing.jpg"}, {**rows[0], "sku": None}]
    goods.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    words = ["--task", "image_vector", "--data", goods, "--id", "sku", "--keep", "price", "--keep", "image"]
    said = command("index", "build", place, "--model", model, *words).stdout
    assert "24 new" in said and "3 repeated (A3, A5, A3): of several records with one id the first counts" in said
    assert "5 of 29 records could not be used (most often: an earlier record has the id A3; keep one of them)" in said
    lines = [json.loads(line) for line in (place / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [line["where"] for line in lines] == [f"{goods}:{number}" for number in (25, 26, 27, 29, 28)]
    assert "missing.jpg" in lines[4]["reason"] and "the id is missing" in lines[3]["reason"]
    told = built(model, goods, tmp_path / "other")
    assert (told["new"], told["repeated"], told["repeated_ids"]) == (24, 3, ["A3", "A5", "A3"])
    assert len(told["rejected"]) == 5
    # A picture that is kept is shown by a path that can be opened from anywhere.
    found = call("index", "search", place, f"photo={tmp_path / '7.jpg'}", "-k", 1)
    assert found[0]["image"] == str(tmp_path / "7.jpg")
    # What another call has passed over takes the place of the file.
    goods.write_text(json.dumps(rows[0], ensure_ascii=False), "utf-8")
    assert call("index", "add", place, "--data", goods)["rejected"] == [] and not (place / "rejects.jsonl").exists()


def test_an_interrupted_build_goes_on(
    model: Path, goods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, seen = tmp_path / "index", []
    monkeypatch.setattr(fill, "BATCH", 10)
    kept = Index.add

    def cut(self: Index, names: list[str], *rest: Any) -> int:
        if len(self) == 10:
            raise KeyboardInterrupt
        return kept(self, names, *rest)

    monkeypatch.setattr(Index, "add", cut)
    with pytest.raises(AssertionError):
        built(model, goods, place)
    monkeypatch.setattr(Index, "add", lambda self, names, *rest: seen.extend(names) or kept(self, names, *rest))
    assert built(model, goods, place)["items"] == 24
    assert len(seen) == 14


def test_what_cannot_be_is_told(model: Path, goods: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gives no vector"):
        call("index", "build", tmp_path / "a", "--model", model, "--task", "vqa", "--data", goods)
    with pytest.raises(UsageError, match="no column 'skew'"):
        call(
            "index",
            "build",
            tmp_path / "a",
            "--model",
            model,
            "--task",
            "image_vector",
            "--data",
            goods,
            "--id",
            "skew",
        )
    assert not (tmp_path / "a").exists()
    built(model, goods, tmp_path / "b")
    with pytest.raises(UsageError, match="was started with other settings .*task: image_vector"):
        call("index", "build", tmp_path / "b", "--model", model, "--task", "text_vector", "--data", goods)
    with pytest.raises(UsageError, match="is not an index"):
        call("index", "search", tmp_path / "c", "text=红")
    Index.create(tmp_path / "own", 4).add(["a"], np.ones((1, 4)))
    with pytest.raises(UsageError, match="does not name the model"):
        call("index", "search", tmp_path / "own", "text=红")


def columns_of(place: Path) -> dict[str, str]:
    return dict(Index.open(place).about["columns"])


def test_a_price_after_whole_ones_makes_a_column_of_numbers(model: Path, goods: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in goods.read_text("utf-8").splitlines()]
    rows[-1]["price"] = 99.5
    goods.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    built(model, goods, tmp_path / "index")
    assert columns_of(tmp_path / "index") == {"price": "float64", "colour": "string"}
    found = call("index", "search", tmp_path / "index", "text=红", "--where", "price > 99 AND price < 100")
    assert [(hit["id"], hit["price"]) for hit in found] == [("A23", 99.5)]


def test_a_price_in_a_csv_is_a_number_and_a_code_with_zeros_is_a_text(model: Path, goods: Path, tmp_path: Path) -> None:
    table = tmp_path / "goods.csv"
    table.write_text("image,sku,price,code\n0.jpg,7,99.5,007\n1.jpg,8,,012\n2.jpg,9,250,100\n", "utf-8")
    words = ("index", "build", tmp_path / "index", "--model", model, "--task", "image_vector", "--query-task",
             "text_vector", "--data", table, "--id", "sku", "--keep", "code", "--keep", "sku")  # fmt: skip
    call(*words, "--keep", "price")
    assert columns_of(tmp_path / "index") == {"code": "string", "sku": "string", "price": "float64"}
    found = call("index", "search", tmp_path / "index", "text=红", "--where", "price < 100 AND code = '007'")
    assert [(hit["id"], hit["price"], hit["code"]) for hit in found] == [("7", 99.5, "007")]
    more = tmp_path / "more.csv"
    more.write_text("image,sku,price,code\n3.jpg,10,12.25,1\n4.jpg,11,cheap,1\n5.jpg,12,3,2\n", "utf-8")
    told = call("index", "add", tmp_path / "index", "--data", more)
    assert told["new"] == 2 and told["items"] == 5
    assert len(told["rejected"]) == 1 and "more.csv:3: price is 'cheap'" in told["rejected"][0]
    with pytest.raises(UsageError, match=r"was started with other settings \(columns: code text, .*price float\)"):
        call(*words, "--keep", "price:int")
    own = ("index", "build", tmp_path / "own", *words[3:], "--keep", "price:text")
    call(*own)
    assert columns_of(tmp_path / "own")["price"] == "string"


def test_new_replaced_and_unknown_items_are_counted_and_named(model: Path, goods: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    built(model, goods, place)
    again = built(model, goods, place)
    assert (again["new"], again["replaced"], again["passed_over"]) == (0, 0, 24)
    rows = [{"image": "1.jpg", "sku": sku, "price": 1, "colour": "绿"} for sku in ("A3", "B1", "A4", "B1", None)]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    told = call("index", "add", place, "--data", more)
    assert (told["new"], told["replaced"], told["replaced_ids"]) == (1, 2, ["A3", "A4"]) and told["items"] == 25
    assert [reason.partition(": ")[2] for reason in told["rejected"]] == [
        "an earlier record has the id B1; keep one of them.",
        "the id is missing: an id is a text or a whole number.",
    ]
    shown = CliRunner().invoke(commands(), ["index", "add", str(place), "--data", str(more)])
    assert "0 new, 3 replaced (A3, B1, A4);" in shown.output and "2 of 5 records could not be used" in shown.output
    gone = call("index", "delete", place, "B1", "Z1", "Z1")
    assert (gone["deleted"], gone["unknown"], gone["unknown_ids"]) == (1, 1, ["Z1"])
    shown = CliRunner().invoke(commands(), ["index", "delete", str(place), "Z1", "Z2", "A5"])
    assert "1 deleted (A5);" in shown.output and "2 unknown (Z1, Z2)" in shown.output


def test_data_without_a_column_of_the_index_are_refused(model: Path, goods: Path, tmp_path: Path) -> None:
    built(model, goods, tmp_path / "index")
    (tmp_path / "more.jsonl").write_text(json.dumps({"image": "1.jpg", "sku": "A3", "prise": 1, "colour": "绿"}))
    with pytest.raises(UsageError, match="no column 'price'. Did you mean \"prise\""):
        call("index", "add", tmp_path / "index", "--data", tmp_path / "more.jsonl")
    (tmp_path / "more.jsonl").write_text('{"image": "no.jpg", "sku": "A3", "price": 1, "colour": "绿"}\n{')
    done = CliRunner().invoke(
        commands(), ["index", "add", str(tmp_path / "index"), "--data", str(tmp_path / "more.jsonl")]
    )
    assert done.exit_code == 1 and "2 of 2 records could not be used" in done.output
    assert "more.jsonl:2 is not valid" in (tmp_path / "index/rejects.jsonl").read_text("utf-8")


def test_an_item_that_is_too_long_costs_itself_or_is_truncated(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n红色\n" + "蓝" * 1000 + "\n杯子\n", "utf-8")
    words = ("--model", model, "--task", "text_vector", "--data", tmp_path / "a.csv")
    told = call("index", "build", tmp_path / "index", *words)
    assert told["items"] == 2 and len(told["rejected"]) == 1
    assert "a.csv:3" in told["rejected"][0] and "The prompt has" in told["rejected"][0]
    assert call("index", "add", tmp_path / "index", "--data", tmp_path / "a.csv", "--truncate", "start")["items"] == 3
    with pytest.raises(ContextLengthError):
        call("index", "search", tmp_path / "index", "text=" + "蓝" * 1000)
    hits = call("index", "search", tmp_path / "index", "text=" + "蓝" * 1000, "--truncate", "start")
    assert hits[0]["id"].endswith("a.csv:3")


def test_each_record_is_read_once(model: Path, goods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    prompt = Session.prompt

    def counted(session: Session, task: Any, record: Any, *more: Any, **named: Any) -> Any:
        read.append(Request.of(record).record["sku"])
        return prompt(session, task, record, *more, **named)

    monkeypatch.setattr(Session, "prompt", counted)
    built(model, goods, tmp_path / "index")
    assert sorted(read) == sorted(f"A{number}" for number in range(24))
