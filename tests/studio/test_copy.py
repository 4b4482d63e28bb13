"""Texts by the batch: rules and facts are kept, a kill loses nothing, winners become data."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.errors import DataError, UsageError
from openm6.inference import Generated
from openm6.inference.session import Session
from openm6.studio import copy as copywriting
from openm6.studio.copy import make_copy, write_labelled_copy
from openm6.studio.review import batch_folder
from openm6.train.trainer import train
from openm6.worlds.market import open_market
from tests.conftest import command as run, drawing_session
from tests.train.conftest import tiny_recipe

COLOURS = "红橙黄绿蓝紫粉黑"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    data = [{"source": "market:copy/train?records=300", "task": "product_copy"}]
    recipe = tiny_recipe(
        tmp_path_factory.mktemp("run"), data=data, steps=40, checkpoint_every=40, row_length=256, learning_rate=2e-2
    )
    return Session.load(train(recipe), "cpu")


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """A table as shops have it: a row an item."""
    market = open_market("copy", "test", 3, 20)
    rows = [market[i]["attributes"][0] for i in range(20)]
    names = ["品牌", "品类", "颜色", "图案", "材质", "风格", "季节", "价格"]
    lines = [",".join(names), *(",".join(row[name] for name in names) for row in rows)]
    (tmp_path / "items.csv").write_text("\n".join(lines), "utf-8")
    return tmp_path / "items.csv"


OPTIONS: dict[str, Any] = {
    "candidates": 3, "keep": 2, "most": 24, "decoding": {"max_new_tokens": 30},
    "lexicon": "market:copy/train?records=300",
}  # fmt: skip


def lines_of(folder: Path, name: str = "candidates.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_texts_keep_the_rules_and_the_facts_of_their_item(session: Session, items: Path, tmp_path: Path) -> None:
    told = make_copy(session, "product_copy", items, tmp_path / "out", forbid=["只要", "好"], **OPTIONS)
    rows = [row for row in lines_of(tmp_path / "out") if row["rank"]]
    assert told["items"] == 20 and told["texts"] == len(rows)
    written = [(row["prompt"], row["said"]) for row in (*rows, *lines_of(tmp_path / "out", "broken.jsonl"))]
    given = {row["prompt"]: row["given"]["attributes"] for row in lines_of(tmp_path / "out")}
    for number, text in written:  # also those that are not kept were written under the rules
        assert "只要" not in text and "好" not in text and len(text) <= 24
        for colour in COLOURS:
            assert f"{colour}色" not in text or given[number]["颜色"] == f"{colour}色"
    for row in rows:
        price = given[row["prompt"]]["价格"]
        assert all(number == price[:-1] for number in re.findall("[0-9]+", row["said"]))
        assert row["said"][-1] in copywriting.SENTENCE_ENDS
    assert len({row["said"] for row in rows}) == len(rows)
    page = (tmp_path / "out" / "review.html").read_text("utf-8")
    as_json = (json.dumps(row["said"], ensure_ascii=False).replace("<", "\\u003c") for row in rows)
    assert all(said in page for said in as_json)  # with the escapes of a script


@pytest.mark.slow
def test_a_killed_batch_goes_on_to_the_same_texts(
    session: Session, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copywriting, "ITEMS", 6)
    whole = make_copy(session, "product_copy", items, tmp_path / "whole", **OPTIONS)

    def stop(done: int, total: int) -> None:
        assert total == 20
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_copy(session, "product_copy", items, tmp_path / "cut", **OPTIONS, on_progress=stop)
    file = tmp_path / "cut" / "candidates.jsonl"
    assert {row["prompt"] for row in lines_of(tmp_path / "cut")} == set(range(12))
    whole_lines = [line for line in file.read_text("utf-8").splitlines(True) if json.loads(line)["prompt"] < 8]
    file.write_text("".join(whole_lines) + '{"file": "000008-1", "pro', "utf-8")
    with open(tmp_path / "cut" / "broken.jsonl", "ab") as torn:
        torn.write('{"prompt": 8, "said": "一'.encode()[:-1])
    told = make_copy(session, "product_copy", items, tmp_path / "cut", **OPTIONS)
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")
    assert lines_of(tmp_path / "cut", "broken.jsonl") == lines_of(tmp_path / "whole", "broken.jsonl")
    assert told["broken"] == whole["broken"]
    assert (tmp_path / "cut" / "texts.csv").read_bytes() == (tmp_path / "whole" / "texts.csv").read_bytes()
    with pytest.raises(UsageError, match="was started with most 24, not 30"):
        make_copy(session, "product_copy", items, tmp_path / "cut", **{**OPTIONS, "most": 30})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["candidates.jsonl", "broken.jsonl"])
def test_a_damaged_line_with_others_behind_it_is_refused(
    session: Session, items: Path, tmp_path: Path, name: str
) -> None:
    options = {**OPTIONS, "lexicon": None, "candidates": 2, "keep": 1}
    make_copy(session, "product_copy", items, tmp_path / "out", **options)
    lines = (tmp_path / "out" / name).read_text("utf-8").splitlines(keepends=True)
    if name == "broken.jsonl":  # a line for a text that was not kept
        lines = [json.dumps({"prompt": 0, "said": said}) + "\n" for said in "abc"]
    (tmp_path / "out" / name).write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]), "utf-8")
    with pytest.raises(DataError, match=f"{name}:2 is damaged"):
        make_copy(session, "product_copy", items, tmp_path / "out", **options)


def test_the_texts_are_a_table_in_the_order_of_the_items(session: Session, items: Path, tmp_path: Path) -> None:
    rows = [line.split(",") for line in items.read_text("utf-8").splitlines()]
    table = "".join(
        ",".join([*row, "sku" if not n else f"00{n}", "text" if not n else f"旧{n}"]) + "\n"
        for n, row in enumerate(rows)
    )
    lines = table.splitlines(keepends=True)
    items.write_text("".join([*lines[:3], "少,一列\n", *lines[3:]]), "utf-8")
    options = {**OPTIONS, "lexicon": None, "candidates": 2, "keep": 1}
    made = make_copy(
        session, "product_copy", items, tmp_path / "out", id_column="sku", table=["品类", "text"], **options
    )
    raw = Path(made["table"]).read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")  # by which Excel knows UTF-8
    found = list(csv.DictReader(raw.decode("utf-8-sig").splitlines()))
    assert list(found[0]) == ["sku", "品类", "item text", "rank", "text", "reason"]
    assert [row["sku"] for row in found] == ["001", "002", "", *(f"00{n}" for n in range(3, 21))]
    assert "items.csv:4 has 2 fields" in found.pop(2)["reason"]
    assert [row["item text"] for row in found] == [f"旧{n}" for n in range(1, 21)]
    said = {row["prompt"]: row["said"] for row in lines_of(tmp_path / "out")}
    assert [row["text"] for row in found] == [said[n] for n in range(20)]
    assert all(bool(row["text"]) != bool(row["reason"]) for row in found)
    again = make_copy(session, "product_copy", items, tmp_path / "out", **options)  # other columns, the same texts
    header = Path(again["table"]).read_text("utf-8-sig").splitlines()[0].split(",")
    assert header == ["item", *rows[0], "sku", "item text", "rank", "text", "reason"]
    with pytest.raises(UsageError, match="no column 'skew'"):
        make_copy(session, "product_copy", items, tmp_path / "out", id_column="skew", **options)
    items.write_text(table.replace(",003,", ",999,"), "utf-8")
    with pytest.raises(UsageError, match=r"items.csv:4 has changed since .* was started"):
        make_copy(session, "product_copy", items, tmp_path / "out", **options)


def test_what_is_wrong_is_left_out_with_the_reason(session: Session) -> None:
    task = session.task("product_copy")
    tokenizer = session.processor.tokenizer
    limits = copywriting.Limits(tokenizer, ["蓝色"], ["199"], 4, 30)
    said = [
        "这条红色裙子199元。", "这条蓝色裙子199元。", "只要99元就好。", "好。", "这条红色裙子199元！", "没有说完", "",
        "别的话说完了。", "绿色的裙子很好看。而且",
    ]  # fmt: skip
    written = [Generated(tokenizer.encode(text), -float(n), text != "没有说完") for n, text in enumerate(said)]
    good, bad = copywriting.judge_texts(session, task, written, limits, {"别的话说完了。": 4})
    # What comes to no end is kept up to its last sentence, behind what does.
    assert [text for text, _ in good] == ["这条红色裙子199元。", "绿色的裙子很好看。"]
    reasons = dict(bad)
    assert reasons["这条蓝色裙子199元。"] == "says 蓝色"
    assert reasons["只要99元就好。"] == "says 99, which is not given"
    assert "fewer than 4" in reasons["好。"] and reasons["这条红色裙子199元！"].startswith("is like")
    assert reasons["没有说完"] == "does not come to an end" and reasons[""] == "says nothing"
    assert reasons["别的话说完了。"] == "was written for item 5 already"
    assert {copywriting.kind_of_reason(reason) for reason in reasons.values()} == {
        "what it must not say", "a number that is not given", "too short", "alike", "does not come to an end",
        "nothing said", "written already",
    }  # fmt: skip


def test_every_item_has_a_text_or_a_reason(session: Session, items: Path, tmp_path: Path) -> None:
    """In the table and on the page, an item that could not be used and a row that could not be read among them."""
    lines = [f"{line},{'photo' if not n else 'p.png'}" for n, line in enumerate(items.read_text("utf-8").splitlines())]
    lines[3] = ",".join(["很长" * 2000, *lines[3].split(",")[1:]])
    items.write_text("\n".join([*lines[:5], "少,一列", *lines[5:]]), "utf-8")
    Image.new("RGB", (640, 20)).save(tmp_path / "p.png")
    options = {**OPTIONS, "lexicon": None, "candidates": 2, "keep": 1, "forbid": ["。", "！"]}
    made = make_copy(session, "product_copy", items, tmp_path / "out", **options)
    table = list(csv.DictReader(Path(made["table"]).read_text("utf-8-sig").splitlines()))
    assert "photo" not in table[0] and len(table) == 21
    assert all(bool(row["text"]) != bool(row["reason"]) for row in table)
    page = Path(made["page"]).read_text("utf-8").partition('type="application/json">')[2].partition("</script>")[0]
    shown = json.loads(page)["items"]
    assert [item["id"] for item in shown] == [row["item"] for row in table]
    assert [item["reason"] for item in shown] == [row["reason"] for row in table]
    assert shown[2]["reason"] and "2 fields" in shown[4]["reason"]
    assert shown[5]["shown"] == dict(zip(lines[0].split(",")[:-1], lines[5].split(",")[:-1], strict=True))
    assert [one["said"] for item in shown for one in item["candidates"]] == [r["text"] for r in table if r["text"]]
    assert [item["pictures"] for item in shown[:5:2]] == [["pictures/000000.jpg"], ["pictures/000002.jpg"], []]
    assert Image.open(tmp_path / "out" / "pictures" / "000019.jpg").size == (320, 10)
    given = lines_of(tmp_path / "out")[0]["given"]["attributes"]
    assert "photo" not in given and "品牌" in given


def test_winners_become_data(session: Session, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        copywriting, "SENTENCE_ENDS", "".join(map(chr, range(0x10000)))
    )  # so small a model seldom ends well
    make_copy(session, "product_copy", items, tmp_path / "out", **OPTIONS)
    rows = [row for row in lines_of(tmp_path / "out") if row["rank"]]
    verdicts: list[dict[str, Any]] = [{"file": row["file"], "accepted": row["rank"] == 1} for row in rows]
    edited = next(verdict for verdict in verdicts if verdict["accepted"])
    edited["text"] = "改过的文案。"
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, verdicts)), "utf-8")
    told = write_labelled_copy(tmp_path / "out", tmp_path / "labels.jsonl")
    first = sum(row["rank"] == 1 for row in rows)
    assert first and told["labelled"] == len(rows) and told["accepted"] == pytest.approx(first / len(rows))
    assert told["by_rank"][1]["accepted"] == 1 and told["edited"] == pytest.approx(1 / len(rows))
    kept = {row["said"] for row in rows if row["rank"] == 1 and row["file"] != edited["file"]}
    assert {row["copy"] for row in lines_of(tmp_path / "out", "labelled.jsonl")} == {"改过的文案。", *kept}
    data = [{"source": told["file"], "task": "product_copy"}]
    assert len(lines_of(tmp_path / "out", "labelled.jsonl")) == first
    train(tiny_recipe(tmp_path / "next", data=data, steps=1, checkpoint_every=1, row_length=256))
    for line, said in (
        ('{"file": "x", "accepted": true}', "has no text 'x'"),
        ('{"accepted": true}', "labels.jsonl:1 names no text"),
        (json.dumps({**edited, "text": " "}), "text is ''; it is the edited form of a text that was accepted"),
        (json.dumps({**edited, "accepted": False}), "it is the edited form of a text that was accepted"),
        (json.dumps(edited) + "\n" + json.dumps({**edited, "text": "又改。"}), "another text here than in .*jsonl:1"),
    ):
        (tmp_path / "labels.jsonl").write_text(line, "utf-8")
        with pytest.raises(DataError, match=said):
            write_labelled_copy(tmp_path / "out", tmp_path / "labels.jsonl")


def test_labels_of_texts_speak_of_texts_and_those_of_pictures_of_pictures(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"file": "x", "accepted": true}', "utf-8")
    about: dict[str, Any] = {"slots": {}, "picture": "copy"}
    with batch_folder(tmp_path / "texts", {}, {**about, "kind": "texts"}, resume=False):
        pass
    with batch_folder(tmp_path / "pictures", {}, about, resume=False):
        pass
    for command, own, other in (("copy", "texts", "images"), ("images", "pictures", "copy")):
        there = {"texts": "pictures", "pictures": "texts"}[own]
        for folder, said in (
            (tmp_path, f"is not a batch: it has no batch.json. Make one by `openm6 {command} batch`."),
            (tmp_path / there, f"is a batch of {there}: `openm6 {other} labels` reads its labels."),
        ):
            with pytest.raises(UsageError, match=said):
                run(command, "labels", folder, labels)
        with pytest.raises(DataError, match=f"has no {own[:-1]} 'x'"):
            run(command, "labels", tmp_path / own, labels)


@pytest.mark.slow
def test_the_command_and_what_cannot_be(session: Session, items: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("只要\n\n不\n", "utf-8")
    words = ["copy", "batch", str(session.path), "--items", str(items), "--output", str(tmp_path / "out"), "-n", "2",
             "--keep", "1", "--forbid-file", str(tmp_path / "words.txt"), "--max", "20",
             "--id", "品牌", "--columns", "品类, 颜色", "--json"]  # fmt: skip
    done = CliRunner().invoke(commands(), words)
    assert done.exit_code == 0, done.output
    brands = {line.split(",")[0] for line in items.read_text("utf-8").splitlines()[1:]}
    assert json.loads(done.stdout)["items"] == len(brands) < 20  # of an id that stands twice the first row is written
    header = (tmp_path / "out" / "texts.csv").read_text("utf-8-sig").splitlines()[0]
    assert header == "品牌,品类,颜色,rank,text,reason"
    with pytest.raises(UsageError, match="does not write one text"):
        make_copy(session, "slogan_pair", items, tmp_path / "a")
    with pytest.raises(UsageError, match="keep is 9"):
        make_copy(session, "product_copy", items, tmp_path / "a", keep=9)
    with pytest.raises(UsageError, match="cannot be"):
        make_copy(session, "product_copy", items, tmp_path / "a", least=9, most=4)
    assert not (tmp_path / "a").exists()


def test_an_item_that_leaves_no_room_for_the_text_asked_for_costs_one_item(tmp_path: Path) -> None:
    writer = drawing_session(200, positions="learned", max_position_embeddings=256)
    writer.tasks["product_copy"] = writer.task("product_copy")
    (tmp_path / "items.csv").write_text(f"品类,颜色\n手套,蓝色\n帽子,{'红色的' * 30}\n", "utf-8")
    options = {"candidates": 1, "facts": False, "decoding": {"max_new_tokens": 180}}
    counts = make_copy(writer, "product_copy", tmp_path / "items.csv", tmp_path / "out", **options)
    assert (counts["items"], counts["bad"]) == (1, 1)
    assert "items.csv:3 is too long" in lines_of(tmp_path / "out", "rejects.jsonl")[0]["reason"]
