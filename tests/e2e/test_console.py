"""The console in a real browser: every page opened, every kind of form used, by a small model's own server."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from openm6.hub.catalogue import MODEL, Catalogue
from openm6.serve.keys import Keys
from tests.conftest import drawing_session
from tests.e2e.conftest import CHROMIUM, TITLES, Site, choose, leave, on_screen, open_options, serving, shown
from tests.hub.test_jobs import until
from tests.tasks.conftest import picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.xdist_group("console"),
]


@pytest.fixture
def trying(site: Site) -> Iterator[Callable[[str], Any]]:
    """The page to try a task, opened."""
    pages = []

    def open_task(task: str) -> Any:
        page = site.open()
        pages.append(page)
        page.locator("#ask").wait_for()
        choose(page, "Task", TITLES[task])
        page.locator(f"#form-{task}").wait_for()
        return page

    yield open_task
    for page in pages:
        page.close()
    assert not site.wrong


def said(page: Any) -> str:
    return str(page.locator(".said textarea").first.input_value())


def test_a_browser_is_sent_to_its_language(site: Site) -> None:
    for wanted, path in (("zh-CN,zh;q=0.9", "zh"), ("de", "en")):
        told = httpx2.get(site.url + "/", headers={"accept-language": wanted}, follow_redirects=False)
        assert told.headers["location"] == path


def test_a_text_is_asked_with_a_picture_that_is_uploaded(trying: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "cup.png").write_bytes(picture())
    page = trying("vqa")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "cup.png")
    page.get_by_role("textbox", name="Question", exact=True).fill("这是什么？")
    page.locator("img").first.wait_for()
    page.locator("#ask").click()
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()


def test_examples_fill_in_forms_of_every_kind(trying: Callable[[str], Any]) -> None:
    page = trying("product_copy")  # a table of names and values
    page.locator("#ask").click()
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    page = trying("table_question")  # a table of rows, and a text
    page.locator("#example").click()
    until(lambda: page.get_by_role("textbox", name="Question", exact=True).input_value())
    page.locator("#ask").click()
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    page = trying("grounding")  # a box, drawn into the picture
    page.locator("#example").click()
    page.locator("img").first.wait_for()
    page.locator("#ask").click()
    until(lambda: said(page).startswith("["))
    page.locator(".grid-wrap img").first.wait_for()
    page = trying("text_vector")
    page.locator("#example").click()
    until(lambda: page.get_by_role("textbox", name="Text", exact=True).input_value())
    page.locator("#ask").click()
    until(lambda: said(page).startswith("32 dimensions"))


def test_pictures_are_drawn_and_drawn_anew_in_part(trying: Callable[[str], Any], tmp_path: Path) -> None:
    page = trying("text_to_image")
    page.get_by_role("textbox", name="Text", exact=True).fill("红色的杯子")
    open_options(page)
    page.get_by_label("Seed", exact=True).fill("7")
    page.locator("#ask").click()
    until(lambda: page.locator(".grid-wrap img").count() == 4)
    page.get_by_text("seed 7").wait_for()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        grid = page.locator(".grid-wrap")
        assert grid.evaluate("one => one.scrollHeight <= one.clientHeight && one.scrollWidth <= one.clientWidth")
        pictures, captions = (page.locator(f".grid-wrap {one}") for one in ("img", ".caption-label"))
        assert [text.startswith("best") for text in captions.all_inner_texts()] == [True, False, False, False]
        for image, caption in zip(pictures.all(), captions.all(), strict=True):
            below = image.bounding_box()
            assert caption.bounding_box()["y"] >= below["y"] + below["height"]

    page.get_by_text("Redraw part of a picture").click()
    page.locator("#redraw").click()
    page.get_by_text("Upload a picture and paint over the region to redraw.").wait_for()
    photo = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "photo.png")
    canvas = page.locator("canvas").last
    canvas.wait_for()
    page.wait_for_timeout(1500)  # until it has been given the picture
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 10, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.locator("#redraw").click()
    page.locator(".grid-wrap img").nth(3).wait_for(state="detached")
    until(lambda: page.locator(".grid-wrap img").count() == 4)
    source = page.locator(".grid-wrap img").first.get_attribute("src")
    found = np.asarray(Image.open(io.BytesIO(httpx2.get(source).content)))
    assert found.shape == photo.shape
    changed = (found != photo).any(2)
    assert 0 < changed.mean() < 0.1 and changed[240, 320]


def test_options_with_a_default_are_changed(trying: Callable[[str], Any]) -> None:
    page = trying("text_continuation")
    page.get_by_role("textbox", name="Text", exact=True).fill("红色的")
    open_options(page)
    page.get_by_label("Max tokens", exact=True).fill("3")
    page.locator("#ask").click()
    page.get_by_text("3 tokens in").wait_for()


def test_what_cannot_be_asked_is_told(trying: Callable[[str], Any]) -> None:
    page = trying("vqa")
    page.get_by_role("textbox", name="Question", exact=True).fill("这是什么？")
    page.locator("#ask").click()
    page.locator("[role=alert]").filter(has_text="photo").wait_for()
    assert on_screen(page, page.locator("[role=alert]"))


def test_two_models_are_asked_the_same(site: Site) -> None:
    page = site.open("en/compare")
    page.locator("#ask").wait_for()
    choose(page, "Task", TITLES["text_continuation"])
    page.get_by_text(TITLES["text_continuation"]).locator("visible=true").first.wait_for()
    page.get_by_role("textbox", name="Text", exact=True).fill("红色的")
    page.locator("#ask").click()
    until(lambda: page.get_by_text(re.compile(r"\d+ tokens in")).count() == 2)
    left, right = (page.locator(".said textarea").nth(number).input_value() for number in range(2))
    assert left == right
    page.close()


def test_a_data_set_is_added_and_its_problems_shown(site: Site) -> None:
    page = site.open("en/data")
    page.get_by_text("Add a data set").click()
    for name in ("reviews", "evil"):
        page.locator("#data-name textarea, #data-name input").fill(name)
        page.locator("#data-source textarea, #data-source input").fill(str(site.folder / f"{name}.jsonl"))
        page.locator("#add").click()
        until(lambda name=name: page.get_by_label("Data set", exact=True).first.input_value() == f"{name}@1")
    shown(page, "onerror")
    choose(page, "Data set", "reviews@1")
    shown(page, "第3条")
    shown(page, re.compile("reviews.jsonl.*13"))
    assert page.title() != "broken" and not page.locator("img[src=x]").count()
    page.close()


def test_a_model_is_taught_watched_kept_and_made_live(site: Site) -> None:
    page = site.open("en/finetune")
    until(lambda: page.get_by_label("Base model", exact=True).first.input_value())
    choose(page, "Task", "Classify a text")
    box = page.get_by_label("Training data", exact=True).first
    box.fill(str(site.folder / "reviews.jsonl"))
    box.press("Enter")
    open_options(page)
    page.locator("#steps input").fill("4")
    page.locator("#folder textarea, #folder input").fill(str(site.folder / "runs" / "taught"))
    page.get_by_label("More options of openm6 finetune").fill("train.log_every=1")
    page.locator("#submit").click()
    page.get_by_text("done", exact=True).first.wait_for(timeout=180_000)
    page.get_by_text("step 4 of 4").first.wait_for()
    page.locator("#curve canvas, #curve svg").first.wait_for()
    page.locator("#kept-name textarea, #kept-name input").fill("goods")
    page.locator("#keep").click()
    page.get_by_text("Saved to the catalogue as goods@1.").wait_for()
    page.close()

    page = site.open("en/models")
    shown(page, "goods@1")
    page.get_by_text("Add a model").click()
    page.locator("#model-name textarea, #model-name input").fill("goods")
    page.locator("#model-directory textarea, #model-directory input").fill(str(site.folder / "goods" / "model"))
    page.locator("#add").click()
    until(lambda: page.get_by_label("Model", exact=True).first.input_value() == "goods@2")
    choose(page, "Model", "goods@1")
    page.locator("#promote").click()
    page.get_by_text("goods@1 is live and now serves requests here.").wait_for(timeout=120_000)
    choose(page, "Model", "goods@2")
    page.locator("#promote").click()
    page.get_by_text("goods@2 is live and now serves requests here.").wait_for(timeout=120_000)
    page.locator("#rollback").click()
    page.get_by_text("goods@1 is live and now serves requests here.").wait_for(timeout=120_000)
    page.locator("#lineage svg[role=img]").wait_for()
    page.close()
    catalogue = Catalogue(f"sqlite:///{site.folder / 'home' / 'catalogue.db'}", str(site.folder / "home" / "artifacts"))
    live = catalogue.named("goods@live")
    assert live.number == 1 and catalogue.recipe(live) and catalogue.names(MODEL) == ["goods"]
    assert httpx2.get(f"{site.url}/v1/models/goods").json()["directory"] == "goods@1"


def test_verdicts_become_data(site: Site) -> None:
    page = site.open("en/review")
    page.get_by_text("0 of", exact=False).first.wait_for()
    total = int(re.search(r"of (\d+) reviewed", page.locator("#far").inner_text())[1])  # type: ignore[index]
    page.locator("body").press("a")
    page.get_by_text(f"1 of {total} reviewed, 1 accepted").wait_for()
    page.locator("#reject").click()
    page.get_by_text(f"2 of {total} reviewed, 1 accepted").wait_for()
    page.locator("body").press("u")
    page.get_by_text("this one: rejected").wait_for()
    page.locator("#accept").click()
    page.get_by_text(f"2 of {total} reviewed, 2 accepted").wait_for()
    page.locator("#finish").click()
    page.get_by_text("100% of 2 accepted").wait_for()
    lines = (site.folder / "runs" / "cups" / "labelled.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["verdict_quality"] for line in lines] == [1, 1]
    assert page.title() != "broken"
    page.close()


def test_what_is_live_is_shown(site: Site) -> None:
    page = site.open("en/serving")
    page.get_by_text("Models of this server").wait_for()
    shown(page, re.compile("^goods$"))
    until(lambda: page.locator("#chart-tokens canvas, #chart-tokens svg").count())
    page.close()
    assert not site.wrong


@pytest.fixture
def locked(tmp_path: Path, browser: Any) -> Iterator[tuple[Site, dict[str, str]]]:
    """A server with keys, and the keys by name."""
    drawing_session().save(tmp_path / "goods" / "model")
    store = Keys(tmp_path / "keys.json")
    keys = {name: store.add(name, role=role) for name, role in (("reader", "use"), ("chief", "manage"))}
    environment = {**os.environ, "OPENM6_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    process, url = serving(tmp_path, environment, tmp_path / "goods" / "model", "--keys", store.path)
    with process:
        yield Site(url, tmp_path, browser), keys
        leave(browser)
        process.terminate()


def test_keys_are_asked_for_and_their_roles_kept(locked: tuple[Site, dict[str, str]]) -> None:
    site, keys = locked
    for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
        assert httpx2.get(f"{site.url}/en/{path}", timeout=60).status_code == 401  # the pages are built first
    page = site.open("en/models")
    fields = page.locator("input")
    fields.nth(0).fill("reader")
    fields.nth(1).fill(keys["chief"])
    page.get_by_role("button").first.click()
    page.get_by_text(re.compile("[Ii]ncorrect|[Ii]nvalid")).first.wait_for()
    fields.nth(0).fill("reader")  # emptied
    fields.nth(1).fill(keys["reader"])
    page.get_by_role("button").first.click()
    page.get_by_text("Add a model").click()
    page.locator("#model-name textarea, #model-name input").fill("mine")
    page.locator("#model-directory textarea, #model-directory input").fill(str(site.folder / "goods" / "model"))
    page.locator("#add").click()
    page.get_by_text("This action requires a key with the role manage.").wait_for()
    page.close()
