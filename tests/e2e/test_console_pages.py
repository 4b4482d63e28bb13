"""The console as people see it: it fits, is readable and reached by keys, in one language, on a screen and a phone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.e2e.conftest import CHROMIUM, PAGES, TITLES, Site, choose, list_every_task, on_screen, settled, shown

BROKEN = """[...document.querySelectorAll("th, h1, nav a")].filter(element => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return new Set([...range.getClientRects()].map(line => line.top)).size > 1;
}).map(element => element.innerText)"""
"""Headings of more than one line."""
FOCUSED = """(element => [element.id || element.innerText || element.ariaLabel || element.tagName,
    getComputedStyle(element).outlineStyle])(document.activeElement)"""
"""What a key would act on, and how its edge is drawn."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.xdist_group("console"),
]


@pytest.mark.parametrize(("language", "width"), [("en", 390), ("zh", 1280)])
def test_every_page_fits_and_is_accessible(site: Site, language: str, width: int) -> None:
    """WCAG's levels A and AA, as axe finds them, in the light and in the dark look; in the language of the page,
    whatever the browser prefers; with a link to the other language."""
    found, other = [], {"en": "zh", "zh": "en"}[language]
    for path in PAGES:
        page = site.open(f"{language}/{path}", width=width, locale="de-DE")
        settled(page)
        assert page.title() == "OpenM6" or path, path
        assert page.locator("h1").count() == 1 and page.locator("nav [aria-current=page]").count() == 1, path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        broken = page.evaluate(BROKEN)
        assert broken == [], path
        assert page.evaluate("document.documentElement.lang") == {"en": "en", "zh": "zh-CN"}[language]
        assert page.locator("a.language").evaluate("link => link.href") == f"{site.url}/{other}/{path}"
        found += [(path, *problem) for problem in problems(page)]
        page.emulate_media(color_scheme="dark")
        settled(page)
        assert page.evaluate("document.body.classList.contains('dark')"), path
        found += [(path, "dark", *problem) for problem in problems(page)]
        page.close()
    assert found == []
    assert not site.wrong


def problems(page: Any) -> list[tuple[str, str]]:
    """What axe finds that is serious or critical, as (rule, place)."""
    told = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [one for one in told if one["impact"] in ("serious", "critical")]
    return [(one["id"], node["html"][:200]) for one in serious for node in one["nodes"]]


def test_the_dark_look_is_there_from_the_start(site: Site) -> None:
    page = site.open(color_scheme="dark")
    page.locator("body.dark h1").wait_for()
    page.close()


def test_the_menu_leads_to_the_other_language_and_back(site: Site) -> None:
    page = site.open("en/data")
    page.get_by_role("link", name="中文").click()
    page.wait_for_url(f"{site.url}/zh/data")
    page.get_by_role("link", name="English").click()
    page.wait_for_url(f"{site.url}/en/data")
    page.locator("h1").wait_for()
    page.close()
    site.errors.clear()  # a page that is left complains of its connection


def test_what_was_taught_stands_first_and_the_rest_apart(site: Site) -> None:
    page = site.open()
    shown(page, "not trained on any task")
    page.locator("#ask").wait_for()
    choose(page, "Model", "taught")
    page.locator("#every").wait_for()
    box = page.get_by_label("Task", exact=True).first
    box.click()
    options = [text.removeprefix("✓").strip() for text in page.get_by_role("option").all_inner_texts()]
    assert options == [TITLES["vqa"], TITLES["product_copy"]]
    page.keyboard.press("Escape")
    assert not page.locator(".hint").count()
    page.locator("#every input").check()
    page.wait_for_timeout(500)
    choose(page, "Task", TITLES["grounding"])
    page.get_by_text("This model was not trained on this task: its answers are meaningless.").wait_for()
    page.close()


def test_everything_is_reached_by_keys_and_enter_asks(site: Site) -> None:
    page = site.open()
    page.locator("#ask").wait_for()
    list_every_task(page)
    choose(page, "Task", TITLES["text_continuation"])
    page.locator("#form-text_continuation").wait_for()
    settled(page)
    field = page.get_by_role("textbox", name="Text", exact=True)
    field.fill("红色的")
    reached = set()
    for start, count in ((field, 4), (page.locator(".brand"), 9)):
        start.focus()
        for _ in range(count):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(FOCUSED)
            assert outline != "none", name
            reached.add(name.strip())
    assert {"Compare", "Serving", "中文", "ask", "example", "stop"} <= reached
    field.press("Enter")
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    page.close()


def test_on_a_phone_the_answer_and_errors_are_on_the_screen(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cup.png").write_bytes(b"no picture")
    page = site.open(width=390)
    page.locator("#ask").wait_for()
    list_every_task(page)
    choose(page, "Task", TITLES["vqa"])
    page.locator("#form-vqa").wait_for()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "cup.png")
    page.get_by_role("textbox", name="Question", exact=True).fill("这是什么？")
    page.wait_for_timeout(1000)
    page.locator("#ask").click()
    alert = page.locator("[role=alert]").filter(has_text="cannot be read as a picture")
    alert.wait_for()
    page.wait_for_timeout(1000)
    assert on_screen(page, alert) and alert.bounding_box()["y"] < page.locator("#ask").bounding_box()["y"]
    choose(page, "Task", TITLES["text_continuation"])
    page.locator("#form-text_continuation").wait_for()
    page.get_by_role("textbox", name="Text", exact=True).fill("红色的")
    page.locator("#ask").click()
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    page.wait_for_timeout(1000)
    assert on_screen(page, page.locator(".said").first)
    page.close()
