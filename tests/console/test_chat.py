"""A conversation of the page Chat, without a browser. (In one: tests/e2e/test_chat.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import pytest

from openm6.console.chat import Conversation, Turn
from openm6.console.context import PageContext, PageError
from openm6.tasks.slots.messages import as_messages
from tests.console.test_pages import served
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow

EVIL = "<img src=http://example.com/x.png> ![x](http://example.com/y.png) &lt;"


@pytest.fixture
def ui(tmp_path: Path) -> PageContext:
    return PageContext(served(tmp_path)[1], "en")


def test_reasoning_stands_apart_folded_once_the_answer_begins(ui: PageContext) -> None:
    talk = Conversation([Turn("user", "why?"), Turn("assistant", "", reasoning="since")])
    for text, is_running, status in (("", True, "pending"), ("so", True, "done"), ("", False, "done")):
        talk.turns[-1].text = text
        found = gr.Chatbot().postprocess(talk.shown(ui, is_running)).root  # type: ignore[arg-type]
        thought = found[1]
        assert thought.metadata == {"title": "Reasoning", "status": status}
        assert [part.text for one in found for part in one.content] == ["why?", "since", *[text] * bool(text)]  # type: ignore[union-attr]


def test_texts_are_shown_escaped_and_copied_as_they_are(ui: PageContext, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    turns = [Turn("user", EVIL, [str(tmp_path / "a.png")]), Turn("assistant", EVIL, reasoning=EVIL)]
    talk = Conversation(turns, system="Be short.", fields={"model": "m6", "temperature": 0, "adapter": "ours"})
    assert "<img" not in str(talk.shown(ui)) and str(talk.shown(ui)).count("&amp;lt;") == 3
    messages = as_messages(json.loads(talk.copied(ui, "jsonl", ""))["messages"])
    assert messages[0] == {"role": "system", "content": "Be short."}
    assert messages[1]["content"][1]["text"] == EVIL
    assert messages[2] == {"role": "assistant", "content": EVIL, "reasoning_content": EVIL}
    first, body, last = talk.copied(ui, "curl", "http://x/v1; rm").split("\n")
    assert first.startswith("curl 'http://x/v1; rm/chat/completions' ") and last == "END"
    assert json.loads(body) == {**talk.fields, "messages": messages[:2]}
    code = talk.copied(ui, "python", "http://x/v1")
    compile(code, "copied", "exec")
    assert "extra_body={'adapter': 'ours'}" in code and "temperature=0" in code


def test_a_picture_that_was_swept_is_told(ui: PageContext, tmp_path: Path) -> None:
    with pytest.raises(PageError, match="deleted after an hour"):
        Conversation([Turn("user", "", [str(tmp_path / "gone.png")])]).messages(ui)
