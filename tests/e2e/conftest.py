"""A server with a console, what it serves, and a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from openm6.studio.images import make_batch
from openm6.tasks.library import get
from tests.conftest import drawing_session
from tests.e2e.test_serve import command
from tests.processes import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PAGES = ("", "chat", "compare", "data", "finetune", "review", "models", "serving")
QUIET = """() => new Promise(done => {
    let timer = setTimeout(done, 500);
    new MutationObserver(() => { clearTimeout(timer); timer = setTimeout(done, 500); })
        .observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
})"""
"""Ends when nothing of the page has changed for half a second."""
EVIL = "<img src=x onerror=\"document.title='broken'\"><svg onload=\"document.title='broken'\">"
PATIENCE = 30_000
MODELS = {"goods": "goods", "other": "goods", "taught": "taught"}
"""Names of what is served, and where each is: `taught` was taught two tasks, the others none."""
TITLES = {
    "vqa": "Answer a question about a picture", "product_copy": "Product copy", "text_continuation": "Continue a text",
    "grounding": "Find something in a picture", "table_question": "Answer a question about a table",
    "text_vector": "Vector of a text", "text_to_image": "Draw a picture from text",
}  # fmt: skip


@dataclass
class Site:
    """A server, what it keeps, and a browser."""

    url: str
    folder: Path
    browser: Any
    errors: list[str] = field(default_factory=list)

    def open(self, path: str = "en/", width: int = 1200, **options: Any) -> Any:
        options = {"locale": "en-US", **options}
        page = self.browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        page.on("request", lambda asked: None if self._ours(asked.url) else self.errors.append(asked.url))
        page.goto(f"{self.url}/{path}")
        return page

    def _ours(self, url: str) -> bool:
        return url.startswith((self.url, "data:", "blob:"))

    @property
    def wrong(self) -> list[str]:
        """What browsers complained of, and addresses elsewhere that were asked."""
        return self.errors


def prepare(folder: Path) -> dict[str, str]:
    """A model, a data set with a bad line and one with evil texts, a batch of pictures. Returns the environment."""
    environment = {"OPENM6_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    session = drawing_session(200)
    session.save(folder / "goods" / "model")
    session.tasks = {name: get(name) for name in ("vqa", "product_copy")}
    session.save(folder / "taught" / "model")
    session.tasks = {}
    rows = [{"text": f"第{number}条", "label": "好评" if number % 2 else "差评"} for number in range(12)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "reviews.jsonl").write_text("\n".join([*lines, "{torn"]) + "\n", "utf-8")
    (folder / "evil.jsonl").write_text(json.dumps({"text": EVIL, EVIL: "x"}) + "\n", "utf-8")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"caption": text}) + "\n" for text in ("红色的杯子", EVIL)), "utf-8")
    options: dict[str, Any] = {"passes": 2, "guidance": 0}
    make_batch(session, "text_to_image", prompts, folder / "runs" / "cups", candidates=3, keep=2, decoding=options)
    return {**os.environ, **environment}


def serving(folder: Path, environment: dict[str, str], *words: object) -> tuple[subprocess.Popen[bytes], str]:
    place, log = free_port(), folder / "serve.log"
    with log.open("wb") as file:  # a pipe that nobody reads would fill, and stop it
        process = subprocess.Popen(
            command("serve", "--linger", "0", *words, "--port", place),
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
        )
    until, url = time.monotonic() + 180, f"http://127.0.0.1:{place}"
    while True:
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                return process, url
        except httpx2.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, "it takes too long"
            time.sleep(0.05)


def leave(browser: Any) -> None:
    """Close all pages: a server that ends waits for those that listen."""
    for context in browser.contexts:
        context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module: while it is open, its thread has a running event loop, and `asyncio.run` fails there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield one
        one.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server's address, and the folder of what it serves."""
    folder = tmp_path_factory.mktemp("console")
    environment = prepare(folder)
    models = [f"{name}={folder / place / 'model'}" for name, place in MODELS.items()]
    process, url = serving(folder, environment, *models)
    with process:
        yield url, folder
        process.terminate()


@pytest.fixture(scope="module")
def site(served: tuple[str, Path], browser: Any) -> Iterator[Site]:
    yield Site(*served, browser)
    leave(browser)


def choose(page: Any, label: str, text: str) -> None:
    """Choose from a list. One that is opened before the page is filled in closes again: then it is opened once more."""
    from playwright.sync_api import TimeoutError as TooLate

    for left in range(9, -1, -1):
        box = page.get_by_label(label, exact=True).first
        box.click()
        box.fill(text)
        box.press("End")  # a closed list that still has the focus opens when a key is pressed
        try:
            page.get_by_role("option").filter(has_text=text).first.click(timeout=3000)
            page.get_by_role("option").first.wait_for(state="detached")
            return
        except TooLate:
            if not left:
                raise
            box.press("Escape")


def open_options(page: Any) -> None:
    """A field of a closed section is made when the section is opened, and then takes its first value in the place of
    what was filled in at once."""
    page.get_by_text("Options", exact=True).first.click()
    page.evaluate(QUIET)


def list_every_task(page: Any) -> None:
    """Of a model that was taught some, as one is when a test before has made it live, the others are listed too."""
    page.wait_for_timeout(500)
    every = page.locator("#every input")
    if every.is_visible():
        every.check()
        page.wait_for_timeout(500)


def shown(page: Any, text: str | re.Pattern[str]) -> None:
    """Wait until it is seen; tables keep hidden copies of their cells."""
    page.get_by_text(text).locator("visible=true").first.wait_for()


def settled(page: Any) -> None:
    """Until the page has been filled in."""
    page.locator(".live li").first.wait_for()
    page.evaluate(QUIET)


def on_screen(page: Any, place: Any) -> bool:
    box = place.bounding_box()
    return bool(box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"])
