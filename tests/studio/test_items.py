"""A table of goods as merchants keep it: what each row gives, which cannot be used, and that no text adds a fact."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.studio.copy import make_copy
from openm6.studio.items import asked_of, facts_of, is_empty, repeated_rows
from openm6.tasks.library import get
from openm6.train.trainer import train
from tests.train.conftest import tiny_recipe

PRICES = [
    ("1,299元", "1299"), ("2,599", "2599"), ("99.50", "99.5"), ("￥1 099", "1099"), ("１９９元", "199"),
    ("1.2万", "12000"), ("￥1，299.00", "1299"), ("299", "299"), ("", ""), ("-", ""), ("暂无", ""),
    ("一千二百元", "1200"), ("RMB 88", "88"), ("&yen;199", "199"), ("&#165;12,900", "12900"), ("1299元起", "1299"),
    ("None", ""), ("４５９．９０", "459.9"), (" 69元 ", "69"),
]  # fmt: skip
COLOURS = [
    ("红色", "红"), ("红", "红"), ("&nbsp;黑色", "黑"), ("", ""), ("-", ""), ("无", ""), ("暂无", ""),
    ("黑色/白色", "黑白"), ("None", ""), ("蓝色🔵", "蓝"), ("白色\n", "白"), ("绿", "绿"), ("　", ""),
]  # fmt: skip
MATERIALS = [
    ("纯棉", "纯棉"), ("", ""), ("真丝&amp;亚麻", "真丝 亚麻"), ("—", ""), ("羊毛（不含羊绒）", "羊毛"),
    ("仿羊绒", ""), ("真皮", "真皮"), ("无", ""), ("帆布", "帆布"), ("未知", ""), ("玻璃", "玻璃"),
]  # fmt: skip
NAMES = [
    "网红连衣裙",
    "新款衬衫✨",
    "经典\n外套",
    "喝红酒的杯子",
    "金属风书包",
    "绿色出行帆船帽",
    "双肩&lt;书包&gt;",
    "百搭围巾",
]
SAID_COLOURS, SAID_MATERIALS = "红黑蓝白绿", ["纯棉", "真丝", "亚麻", "羊毛", "羊绒", "真皮", "帆布", "玻璃"]


def goods() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """A row and what is true of it, a hundred times: prime numbers of forms, so that all meet."""
    for n in range(100):
        (price, value), (colour, hues), (material, stuffs) = (
            some[n % len(some)] for some in (PRICES, COLOURS, MATERIALS)
        )
        name = NAMES[n % len(NAMES)] + ("超长标题" * 150 if n in (17, 60) else "")
        sku = f"A{(n if n not in (30, 75) else n - 1):03d}"  # two ids stand twice
        row = {"SKU": sku, "商品名": name, "颜色": colour, "材质": material, "价格": price}
        yield row, {"value": value, "colours": hues, "materials": stuffs}


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def untrue(text: str, truth: dict[str, str]) -> list[str]:
    """Colours, materials and numbers of a text that are not true, found with none of the rule's code: every digit and
    every Chinese numeral before 元 counts."""
    said = unicodedata.normalize("NFKC", text)
    found = [f"{c}色" for c in SAID_COLOURS if f"{c}色" in said and c not in truth["colours"]]
    found += [one for one in SAID_MATERIALS if one in said.replace("仿羊绒", "") and one not in truth["materials"]]
    for number in re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", said)):
        scale = 10_000 if f"{number}万" in said else 1
        if not truth["value"] or Decimal(number) * scale != Decimal(truth["value"]):
            found.append(number)
    return found + [f"{one}元" for one in re.findall("([零一二三四五六七八九十百千万]+)元", said) if one != "一千二百"]


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A model that has learned to praise any goods as red, of pure cotton and 299 yuan, and the like."""
    folder = tmp_path_factory.mktemp("liar")
    lines = []
    for n, (row, _) in enumerate(islice(goods(), 100)):
        colour, material = SAID_COLOURS[n % 5], SAID_MATERIALS[n % 8]
        price = ("299元", "1,299元", "99.5元", "199元", "八折", "99元")[n % 6]
        table = {name: cell for name, cell in row.items() if cell.strip() and name != "商品名"}
        text = f"这款{colour}色的{material}好货，只要{price}。"
        lines.append(json.dumps({"attributes": table, "copy": text}, ensure_ascii=False))
    (folder / "lies.jsonl").write_text("\n".join(lines), "utf-8")
    recipe = tiny_recipe(
        folder / "run", data=[{"source": str(folder / "lies.jsonl"), "task": "product_copy"}], steps=80,
        checkpoint_every=80, row_length=256, learning_rate=2e-2,
    )  # fmt: skip
    return Session.load(train(recipe), "cpu")


@pytest.mark.slow
def test_no_kept_text_of_a_hundred_messy_goods_adds_a_fact(liar: Session, tmp_path: Path) -> None:
    rows, truths = zip(*goods(), strict=True)
    rows = (*rows, rows[3], rows[50])  # two rows are equal to earlier ones
    items = write_table(tmp_path / "goods.csv", list(rows))
    options: dict[str, Any] = {"candidates": 4, "decoding": {"max_new_tokens": 40}, "id_column": "SKU"}
    told = make_copy(liar, "product_copy", items, tmp_path / "out", **options)
    table = list(csv.DictReader((tmp_path / "out" / "texts.csv").read_text("utf-8-sig").splitlines(keepends=True)))
    assert all(line["text"] or line["reason"] for line in table)
    assert [sku for sku, _ in groupby(line["SKU"] for line in table)] == [
        sku for sku, _ in groupby(row["SKU"] for row in rows)
    ]
    kept = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text("utf-8").splitlines()]
    texts = [(row["prompt"], row["said"]) for row in kept if row["rank"]]
    assert [(n, text, lies) for n, text in texts if (lies := untrue(text, truths[n]))] == []
    assert len({n for n, _ in texts}) >= 40 and any("元" in text for _, text in texts)
    refused = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert told["bad"] == len(refused) == 6 and told["items"] == 96
    assert sum("is too long for the model: shorten it, above all 商品名" in reason for reason in refused) == 2
    assert sum("has the same SKU as" in reason for reason in refused) == 2
    assert sum("is equal to" in reason for reason in refused) == 2
    # The same model without the rule lies, and the reader finds it.
    make_copy(liar, "product_copy", items, tmp_path / "free", facts=False, **options)
    free = [json.loads(line) for line in (tmp_path / "free" / "candidates.jsonl").read_text("utf-8").splitlines()]
    lies = [row for row in free if row["rank"] and untrue(row["said"], truths[row["prompt"]])]
    assert len(lies) > 40


def test_the_reader_of_this_test_finds_what_is_untrue() -> None:
    truth = {"value": "1299", "colours": "红", "materials": "纯棉"}
    assert untrue("这款红色的纯棉好货，只要1,299元。", truth) == [] == untrue("只要１２９９元，红色。", truth)
    assert untrue("蓝色真丝，299元，只要1元，九十元。", truth) == ["蓝色", "真丝", "299", "1", "九十元"]


def test_rows_that_stand_twice_are_told(tmp_path: Path) -> None:
    rows = [
        {"sku": sku, "名": name}
        for sku, name in [("1", "裙"), ("2", "衫"), ("1", "裙"), ("2 ", "裤"), ("-", "鞋"), ("-", "帽")]
    ]
    source = open_source(write_table(tmp_path / "goods.csv", rows))
    told = repeated_rows(source, "sku")
    assert list(told) == [2, 3]
    assert re.search(r"goods.csv:4 \(sku 1\) is equal to .*goods.csv:2, for which", told[2])
    assert re.search(r"goods.csv:5 \(sku 2 ?\) has the same sku as .*goods.csv:3, for which", told[3])
    assert list(repeated_rows(source, "")) == [2]


def test_an_item_gives_plain_numbers_and_no_entities(tmp_path: Path) -> None:
    task = get("product_copy")
    row = {"颜色": "&nbsp;红色", "价格": "１，２９９元", "材质": "-", "风格": None, "说明": "宽（大）"}
    for value in (row, [row], json.dumps(row)):
        asked = asked_of(task, lambda record: record, {"attributes": value, "copy": "不给"})
        assert list(asked) == ["attributes"]
        cells, texts = facts_of(task, asked)
        assert texts == [] and [(name, cell.strip()) for name, cell in cells] == [
            ("颜色", "红色"), ("价格", "1,299元"), ("说明", "宽（大）")
        ]  # fmt: skip


def test_a_wish_is_no_fact() -> None:
    """A length in characters permits no number in a text."""
    record = {"attributes": {"颜色": "红色"}, "length": "50字", "style": "真丝般柔和"}
    assert facts_of(get("product_copy"), record) == ([("颜色", "红色")], [])
    assert facts_of(get("summary"), {"passage": "售价50元", "length": "20字"}) == ([], ["售价50元"])


def test_what_people_and_spreadsheets_write_into_an_empty_cell_gives_nothing() -> None:
    for cell in (
        None,
        "",
        "　",
        "-",
        "——",
        "／",
        "？",
        "...",
        "***",
        "#N/A",
        "N.A.",
        "None",
        "待补充",
        "未填写",
        "TBD",
    ):
        assert is_empty(cell), cell
    for cell in ("无袖", "红", "0", 0, "S", "NANA", "Ⅲ"):
        assert not is_empty(cell), cell


@pytest.mark.slow
def test_the_lexicon_is_named_and_must_be_one(liar: Session, tmp_path: Path) -> None:
    items = write_table(tmp_path / "goods.csv", [row for row, _ in islice(goods(), 2)])
    options: dict[str, Any] = {"candidates": 1, "keep": 1, "decoding": {"max_new_tokens": 8}}
    told = make_copy(liar, "product_copy", items, tmp_path / "out", **options)
    assert told["lexicon"].endswith("lexicon.yaml")
    settings = json.loads((tmp_path / "out" / "batch.json").read_text("utf-8"))
    assert settings["words"].startswith("lexicon.yaml ")
    (tmp_path / "own.yaml").write_text("colours: {绯: 绯红}", "utf-8")
    own = make_copy(liar, "product_copy", items, tmp_path / "own", lexicon=tmp_path / "own.yaml", **options)
    assert own["lexicon"] == str(tmp_path / "own.yaml")
    with pytest.raises(UsageError, match="was started with"):
        make_copy(liar, "product_copy", items, tmp_path / "out", lexicon=tmp_path / "own.yaml", **options)
    with pytest.raises(UsageError, match="cannot be read"):
        make_copy(liar, "product_copy", items, tmp_path / "none", lexicon=tmp_path / "none.yaml", **options)
