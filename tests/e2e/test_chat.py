"""The page Chat in a browser: an imported chat model answers, stops, sees pictures, and what is said is a text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from openm6.compress.convert import import_model
from openm6.inference.session import Session
from tests.conftest import drawing_session
from tests.e2e.conftest import CHROMIUM, EVIL, TITLES, Site, choose, leave, open_options, serving
from tests.hub.test_jobs import until
from tests.tasks.conftest import picture
from tests.weights.test_chat_files import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.xdist_group("console"),
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Site]:
    """A server of a model that reads pictures and can reason, one that does neither, and one without the task."""
    folder = tmp_path_factory.mktemp("chats")
    for name, embedder, template in (("sees", "stem", "reasoning"), ("reads", "none", "chatml")):
        checkpoint(folder / f"{name}-theirs", template, max_position_embeddings=2048)
        import_model(folder / f"{name}-theirs", folder / name, embedder, 16, 2048)
    drawing_session().save(folder / "goods")
    environment = {**os.environ, "OPENM6_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    process, url = serving(folder, environment, *(f"{name}={folder / name}" for name in ("sees", "reads", "goods")))
    with process:
        yield Site(url, folder, browser)
        leave(browser)
        process.terminate()


@pytest.fixture
def opened(chats: Site) -> Iterator[Any]:
    page = open_page(chats)
    yield page
    page.close()
    assert not chats.wrong


def open_page(chats: Site, path: str = "en/chat") -> Any:
    page = chats.open(path)
    until(lambda: page.locator("#who input").input_value())
    page.locator("#message textarea").wait_for()
    return page


def option(page: Any, name: str, text: str) -> None:
    """Fill in a field below Options, which is made when they are opened."""
    if not page.locator(f"#{name} textarea, #{name} input").count():
        page.get_by_text(re.compile("^(Options|选项)$")).first.click()
    page.wait_for_timeout(500)
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def send(page: Any, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")


def messages(page: Any) -> list[str]:
    return [
        one.strip()
        for one in page.locator("#conversation :is([data-testid=user], [data-testid=bot])").all_inner_texts()
    ]


def answered(page: Any) -> None:
    page.get_by_text(re.compile(r"\d+ tokens in|个词元")).wait_for()


def copied(page: Any, form: str) -> str:
    if not page.locator("#copied textarea").count() or not page.locator("#copied").is_visible():
        page.get_by_text(re.compile("^Copy the conversation$")).click()
    page.locator("#form").get_by_text(form).click()
    page.wait_for_timeout(1000)
    return str(page.locator("#copied textarea").input_value())


def test_turns_are_answered_as_in_python_and_copied(chats: Site, opened: Any) -> None:
    option(opened, "length", "12")
    option(opened, "system", "Be short.")
    send(opened, "the cat")
    answered(opened)
    send(opened, "the dog")
    until(lambda: len(messages(opened)) == 4)
    answered(opened)
    line = json.loads(copied(opened, "JSON lines"))["messages"]
    assert [one["role"] for one in line] == ["system", "user", "assistant", "user", "assistant"]
    session = Session.load(chats.folder / "sees")
    for end in (2, 4):
        assert line[end]["content"] == session.run("chat", messages=line[:end], decoding={"max_new_tokens": 12})
    assert [one["content"].strip() for one in line[1:]] == messages(opened)
    curl = copied(opened, "curl")
    address, body = re.match(r"curl (\S+) .*\n(.*)\nEND$", curl).groups()  # type: ignore[union-attr]
    told = httpx2.post(address, json=json.loads(body)).json()["choices"][0]["message"]["content"]
    assert told == line[-1]["content"]
    code = copied(opened, "Python (openai)")
    said: dict[str, Any] = {"print": lambda text: said.update(answer=text)}
    exec(compile(code, "copied", "exec"), said)
    assert said["answer"] == line[-1]["content"]


def test_an_answer_is_made_again_and_all_is_cleared(opened: Any) -> None:
    opened.locator("#chat-again").click()
    opened.get_by_text("There is no answer yet to regenerate.").wait_for()
    option(opened, "length", "8")
    send(opened, "the cat")
    answered(opened)
    before = messages(opened)
    option(opened, "length", "24")
    opened.locator("#chat-again").click()
    until(lambda: len(messages(opened)) == 2 and messages(opened) != before)
    answered(opened)
    assert messages(opened)[1].startswith(before[1])
    opened.locator("#chat-clear").click()
    until(lambda: not messages(opened))


def test_an_answer_is_stopped_and_stays(opened: Any) -> None:
    option(opened, "length", "1500")
    send(opened, "the cat")
    until(lambda: len(messages(opened)) == 2)
    opened.locator("#chat-stop").click()
    opened.wait_for_timeout(1000)
    stopped = messages(opened)
    opened.wait_for_timeout(1000)
    assert messages(opened) == stopped and len(stopped) == 2
    assert json.loads(copied(opened, "JSON lines"))["messages"][1]["content"].strip() == stopped[1]
    opened.locator("#chat-again").click()
    until(lambda: messages(opened) != stopped and len(messages(opened)) == 2)
    opened.locator("#chat-stop").click()


def test_pictures_are_attached_where_the_model_reads_them(opened: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(picture(32, 32, seed))
    (tmp_path / "no.png").write_bytes(b"no picture")
    option(opened, "length", "8")
    files = opened.locator("#message input[type=file]")
    files.set_input_files(tmp_path / "no.png")
    opened.wait_for_timeout(1000)
    send(opened, "the cat")
    opened.get_by_text("This file cannot be read as a picture").wait_for()
    assert opened.locator("#message textarea").input_value() == "the cat"
    opened.reload()
    until(lambda: opened.locator("#who input").input_value())
    option(opened, "length", "8")
    files.set_input_files([tmp_path / "a.png", tmp_path / "b.png"])
    opened.wait_for_timeout(1000)
    send(opened, "the cat")
    answered(opened)
    assert opened.locator("#conversation img").count() == 2
    content = json.loads(copied(opened, "JSON lines"))["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    choose(opened, "Model", "reads")
    files.wait_for(state="detached")
    send(opened, "the dog")
    opened.get_by_text("This model reads no pictures").wait_for()


def test_what_is_said_is_a_text(opened: Any) -> None:
    evil = f'{EVIL} ![x](http://example.com/x.png) <img src="http://example.com/y.png"> **a** $$b$$'
    option(opened, "length", "8")
    send(opened, evil)
    answered(opened)
    assert messages(opened)[0] == evil
    assert opened.title() != "broken" and not opened.locator("#conversation .message img").count()


def test_reasoning_is_asked_for_where_the_model_can(opened: Any) -> None:
    option(opened, "length", "8")
    opened.locator("#thinking input").check()
    send(opened, "the cat")
    answered(opened)
    assert json.loads(copied(opened, "curl").splitlines()[1])["enable_thinking"] is True
    choose(opened, "Model", "reads")
    opened.locator("#thinking input").wait_for(state="hidden")


def test_tabs_do_not_mix_and_errors_are_the_server_s(chats: Site) -> None:
    pages = [open_page(chats) for _ in range(2)]
    for page, text in zip(pages, ("the cat", "the dog"), strict=True):
        option(page, "length", "8")
        send(page, text)
    for page, text in zip(pages, ("the cat", "the dog"), strict=True):
        answered(page)
        assert messages(page)[0] == text and len(messages(page)) == 2
    option(pages[0], "temperature", "-1")
    send(pages[0], "the bird")
    pages[0].locator("[role=alert]").filter(has_text="temperature").wait_for()
    assert pages[0].locator("#message textarea").input_value() == "the bird" and len(messages(pages[0])) == 2
    for page in pages:
        page.close()


def test_models_without_the_task_are_not_offered(chats: Site, opened: Any) -> None:
    opened.get_by_text("goods: not offered, because the task chat was not trained").wait_for()
    opened.locator("#who input").click()
    assert opened.get_by_role("option").count() == 2
    page = chats.open("zh/chat")
    page.get_by_text("goods 未训练过对话任务").wait_for()
    page.close()


def test_an_answer_whose_form_is_left_is_stopped(chats: Site) -> None:
    """Of the page Try: it would run on unseen for as long as it takes, and later answers would wait for it."""
    page = chats.open("en/")
    page.locator("#ask").wait_for()
    choose(page, "Task", TITLES["text_continuation"])
    page.locator("#form-text_continuation").wait_for()
    open_options(page)
    page.get_by_label("Max tokens", exact=True).fill("1900")
    page.get_by_label("Beam width", exact=True).fill("8")  # which takes half a minute
    page.get_by_role("textbox", name="Text", exact=True).fill("the cat")

    def running() -> bool:
        figures = httpx2.get(f"{chats.url}/metrics").text
        return 'openm6_running{model="sees"} 1' in figures

    page.locator("#ask").click()
    until(running, seconds=10)
    choose(page, "Task", "Summarize a text")
    until(lambda: not running(), seconds=4)
    page.close()
