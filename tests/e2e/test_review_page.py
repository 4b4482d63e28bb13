"""The page on which people review a batch, in a browser: what they do there is what labels and table say."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openm6.core.errors import ContextLengthError
from openm6.data.source import open_source
from openm6.studio.copy import write_labelled_copy
from openm6.studio.images import make_batch, write_labelled
from openm6.studio.items import explain_refusal, goods_pictures, items_of, page_items, repeated_rows
from openm6.studio.review import as_line, batch_folder, write, write_review
from openm6.tasks.library import get
from tests.conftest import drawing_session
from tests.e2e.conftest import CHROMIUM, EVIL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

GOODS = [
    {"sku": "A-1", "品类": "围巾", "颜色": "红色", "价格": "1,299元", "图片": "red.png"},
    {"sku": "A-2", "品类": EVIL, "颜色": "蓝色", "价格": "99元", "图片": "gone.png"},
    {"sku": "A-3", "品类": "帽子", "颜色": "绿色", "价格": "59元", "图片": ""},
]
SAID = {
    0: ["红色围巾，温暖柔软。", "这条围巾只要1,299元。"],
    1: [f"{EVIL}</script><script>document.title='broken'"],
    2: [],
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A batch of texts as `copy batch` writes it: two texts, one, and a reason for having none."""
    Image.new("RGB", (800, 600), "red").save(tmp_path / "red.png")
    with (tmp_path / "goods.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(GOODS[0]))
        table.writeheader()
        table.writerows(GOODS)
    output = tmp_path / "copy"
    about = {"kind": "texts", "slots": {"attributes": "table"}, "picture": "copy"}
    with batch_folder(output, {"task": "product_copy"}, about, resume=False):
        pass
    lines, broken = [], [{"prompt": 2, "said": "蓝色的", "reason": "says 蓝色"}]
    for number, some in SAID.items():
        base = {"prompt": number, "of": len(some), "given": {"attributes": GOODS[number]}}
        for rank, said in enumerate(some, start=1):
            lines.append({**base, "file": f"{number:06d}-{rank}", "rank": rank, "said": said})
    write(output / "candidates.jsonl", map(as_line, lines))
    write(output / "broken.jsonl", map(as_line, broken))
    source = open_source(tmp_path / "goods.csv", images_root=str(tmp_path))
    found = list(items_of(output, source, "sku"))
    pictures = goods_pictures(get("product_copy"), {}, source)
    write_review(output, page_items(output, found, pictures, "sku"), "sku", 12)
    return output


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page; what it complains of, and addresses that it asks for elsewhere, fail the test."""
    wrong: list[str] = []
    contexts = []

    def open_page(file: Path, locale: str = "en-US", width: int = 1280, context: Any = None) -> Any:
        context = context or browser.new_context(locale=locale, viewport={"width": width, "height": 900})
        if context not in contexts:
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def downloaded(page: Any, button: str) -> bytes:
    with page.expect_download() as found:
        page.locator(button).click()
    return Path(found.value.path()).read_bytes()


def lines_of(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().splitlines()]


def test_an_edited_text_is_what_is_trained_on(texts: Path, opened: Any, tmp_path: Path) -> None:
    page = opened(texts / "review.html")
    page.keyboard.press("r")  # the first text
    page.locator("#c1 .change").click()
    area = page.locator("#c1 textarea")
    assert page.locator("#c1 .state").inner_text() == "13 / 12"  # more characters than were asked for
    area.fill(" 围巾只要1,299元。 ")
    area.press("a")  # no verdict while a text is typed
    area.press("Backspace")
    area.press("Control+Enter")
    assert page.locator("#c1 .said").inner_text() == "围巾只要1,299元。"
    assert SAID[0][1] in page.locator("#c1 .was").inner_text()
    page.locator("#c2 .yes").click()
    labels = downloaded(page, "#download")
    assert lines_of(labels) == [
        {"file": "000000-1", "accepted": False},
        {"file": "000000-2", "accepted": True, "text": "围巾只要1,299元。"},
        {"file": "000001-1", "accepted": True},
    ]
    rows = list(csv.reader(downloaded(page, "#table").decode("utf-8-sig").splitlines()))
    assert rows == [
        ["sku", "text", "verdict", "reason"],
        ["A-1", "围巾只要1,299元。", "edited", ""],
        ["A-2", SAID[1][0], "accepted", ""],
        ["A-3", "", "none", "says 蓝色"],
    ]
    (tmp_path / "labels.jsonl").write_bytes(labels)
    told = write_labelled_copy(texts, tmp_path / "labels.jsonl")
    assert told["accepted"] == pytest.approx(2 / 3) and told["edited"] == pytest.approx(1 / 3)
    learned = lines_of((texts / "labelled.jsonl").read_bytes())
    assert [row["copy"] for row in learned] == ["围巾只要1,299元。", SAID[1][0]]
    assert learned[0]["attributes"]["sku"] == "A-1"
    assert page.title() != "broken"


def test_verdicts_and_language_are_remembered_and_taken_back(texts: Path, opened: Any) -> None:
    page = opened(texts / "review.html", "zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert "待审 3" in page.locator("#filters").inner_text() and page.locator("#download").inner_text() == "下载标注"
    page.keyboard.press("a")
    page.keyboard.press("e")
    page.keyboard.type("！")
    page.keyboard.press("Escape")  # an edit that is given up is no verdict
    assert page.locator("#filter--").inner_text() == "待审 2"
    page.locator("#language").click()
    page.close()
    page = opened(texts / "review.html", context=page.context)
    assert "To review 2" in page.locator("#filters").inner_text()
    assert "y" in (page.locator("#c0").get_attribute("class") or "").split()
    assert "here" in (page.locator("#c1").get_attribute("class") or "").split()  # it goes on where nobody has judged
    page.keyboard.press("r")
    page.keyboard.press("u")
    page.keyboard.press("u")
    assert "To review 2" in page.locator("#filters").inner_text()  # this visit's verdicts alone are taken back
    assert lines_of(downloaded(page, "#download")) == [{"file": "000000-1", "accepted": True}]


def test_goods_are_shown_with_their_pictures_and_reasons(texts: Path, opened: Any) -> None:
    page = opened(texts / "review.html", "zh-CN", 390)
    images = page.locator(".goods img")
    assert images.count() == 1 and images.evaluate("one => one.naturalWidth") == 320
    assert page.locator(".item").nth(0).locator("dl").inner_text().split() == [
        "品类",
        "围巾",
        "颜色",
        "红色",
        "价格",
        "1,299元",
    ]
    assert page.locator(".none").inner_text() == "没有文案：写了不能写的“蓝色”"
    page.locator("#filter-none").click()
    assert page.locator(".item b").all_inner_texts() == ["A-3"]
    page.locator("#filter-all").click()
    assert page.locator("script").count() == 2 and page.locator("svg").count() == 0
    assert EVIL in page.locator("#c2 .said").inner_text() and page.title() != "broken"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_are_judged_over_several_pages(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENM6_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"caption": f"红色的杯子第{n}个"}) + "\n" for n in range(26)) + "{torn\n")
    options: dict[str, Any] = {"passes": 1, "guidance": 0}
    output = tmp_path / "batch"
    make_batch(drawing_session(), "text_to_image", prompts, output, candidates=2, keep=1, decoding=options)
    page = opened(output / "review.html")
    assert page.locator("figure > img").count() == 24 and page.locator(".change").count() == 0
    assert page.locator("figure > img").first.evaluate("one => one.naturalWidth") == 16
    page.locator("#c23 .yes").click()
    page.keyboard.press("ArrowRight")  # the next page begins
    assert page.locator("#place").inner_text() == "2 / 2" and page.locator("figure").first.get_attribute("id") == "c24"
    page.keyboard.press("r")
    assert "prompts.jsonl:27" in page.locator(".none").inner_text()
    labels = downloaded(page, "#download")
    assert lines_of(labels) == [
        {"file": "pictures/000023-1.png", "accepted": True}, {"file": "pictures/000024-1.png", "accepted": False},
    ]  # fmt: skip
    (tmp_path / "labels.jsonl").write_bytes(labels)
    assert write_labelled(output, tmp_path / "labels.jsonl")["labelled"] == 2
    rows = list(csv.reader(downloaded(page, "#table").decode("utf-8-sig").splitlines()))
    assert rows[24][:3] == ["24", "pictures/000023-1.png", "accepted"] and rows[25][:3] == ["25", "", "rejected"]
    assert rows[26][2] == "open" and rows[27][2] == "none" and "prompts.jsonl:27" in rows[27][3]


def test_why_an_item_cannot_be_used_is_told_in_chinese_too(texts: Path, opened: Any, tmp_path: Path) -> None:
    rows = [GOODS[0], {**GOODS[0], "品类": "帽子"}, GOODS[1], GOODS[1]]
    with (tmp_path / "twice.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(GOODS[0]))
        table.writeheader()
        table.writerows(rows)
    source, task = open_source(tmp_path / "twice.csv"), get("product_copy")
    error = ContextLengthError("it is too long")
    too_long = explain_refusal(task, lambda row: {"attributes": row}, "sku", error, "twice.csv:2", GOODS[0])
    reasons = [*repeated_rows(source, "sku").values(), too_long]
    page = opened(texts / "review.html", "zh-CN")
    told = [page.evaluate("one => reason(one)", reason.replace(str(tmp_path), "")) for reason in reasons]
    assert len(told) == 3 and not [one for one in told if re.search("[a-z]+ [a-z]+", one)]
    assert all("twice.csv" in one and "sku A-" in one for one in told) and "太长" in told[2]
