"""The console without a browser: its words, its forms, what it does not let through. (In one: tests/e2e.)"""

from __future__ import annotations

import ast
import asyncio
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

import openm6.console
from openm6.console import add_console
from openm6.console.desk import Desk, refusal
from openm6.console.forms import Answer, Form
from openm6.console.site import PAGES
from openm6.hub.jobs import DONE, FAILED, RUNNING, STOPPED, WAITING
from openm6.serve.fleet import Fleet
from openm6.serve.keys import Keys
from openm6.serve.server import Options, Server
from openm6.tasks.library import get, names
from tests.serve.test_security import Site

FOLDER = Path(openm6.console.__file__).parent


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.server.shutdown()


def served(tmp_path: Path, keys: Path | None = None) -> tuple[FastAPI, Server]:
    app, server = FastAPI(), Server(Fleet(), Options(keys=keys))
    app.state.server = server
    add_console(app, server, tmp_path)
    return app, server


def told(name: str) -> dict[str, Any]:
    """A task as a worker tells of it."""
    task = get(name)
    return {
        "slots": {slot: task.slots[slot].type for slot in task.slots}, "inputs": list(task.inputs),
        "outputs": list(task.outputs), "decode": dict(task.decode), "example": dict(task.example),
        "kind": "picture" if task.draws else "vector" if task.embeds else "value" if task.head else "text",
        "instructions": [one.text for one in task.instructions], "description": task.description, "trained": False,
    }  # fmt: skip


def test_every_text_of_the_page_has_its_chinese() -> None:
    said = {name for name, _, _ in PAGES} | {WAITING, RUNNING, DONE, FAILED, STOPPED}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "say":
                said |= {c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant)}
            if (
                isinstance(node, ast.ListComp)
                and isinstance(node.elt, ast.Call)
                and ast.unparse(node.elt.func) == "say"
            ):
                said |= {c.value for c in ast.walk(node.generators[0].iter) if isinstance(c, ast.Constant)}
    chinese = yaml.safe_load((FOLDER / "zh.yaml").read_text("utf-8"))
    assert said == set(chinese)
    assert all(isinstance(text, str) and text for text in chinese.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_form_of_every_task_asks_what_its_example_says(tmp_path: Path, language: str) -> None:
    """Filled in by the button, as a browser would send it back."""
    desk = Desk(served(tmp_path)[1], language)
    for name in names():
        task = told(name)
        with gr.Blocks():
            form, answer = Form(desk, name, task), Answer(desk, task)
        filled = form.example() if form.slots else []
        filled = filled if len(form.slots) > 1 else [filled]
        values = []
        for field, value in zip(form.fields, filled, strict=len(form.slots) > 0):
            if isinstance(field, gr.Dataframe):
                sent = field.postprocess(value if field.headers is None else {"headers": field.headers, "data": value})
                value = field.preprocess(sent)
            values.append(value)
        asked = form.request([*values, *(option.value for option in form.options), 3, ""])
        assert set(asked.inputs) == set(task["inputs"]), name
        assert asked.candidates == (3 if get(name).draws else 1)
        assert len(answer.nothing()) == len(answer.outputs)


def test_examples_are_lines_of_json(tmp_path: Path) -> None:
    desk = Desk(served(tmp_path)[1], "en")
    with gr.Blocks():
        form = Form(desk, "reply", told("reply"))
    options = [option.value for option in form.options]
    rows = [["品类", "手套"], ["", ""]]
    asked = form.request([rows, "有吗", *options, 1, '{"history": "a", "reply": "b"}\n'])
    assert asked.inputs == {"attributes": {"品类": "手套"}, "history": "有吗"}
    assert asked.examples == [{"history": "a", "reply": "b"}]
    for wrong in ("no json", "[1]", "[" * 5000):
        with pytest.raises(gr.Error, match="An example is a JSON object"):
            form.request([rows, "有吗", *options, 1, wrong])


def test_an_error_is_no_html() -> None:
    assert "<" not in refusal("<img src=x onerror=alert(1)>").message


def test_files_of_the_server_are_not_given_out(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with TestClient(served(tmp_path)[0]) as client:
        for path in (
            "file=/etc/passwd", f"file={tmp_path}/secret.txt", "file=../../../../etc/passwd", "file=pyproject.toml",
            "file=%2Fetc%2Fpasswd", "proxy=http://127.0.0.1/x", "runs",
        ):  # fmt: skip
            answer = client.get(f"/en/gradio_api/{path}", follow_redirects=False)
            assert answer.status_code in (400, 401, 403, 404), path


def test_pictures_are_not_fetched_from_addresses(tmp_path: Path, site: Site) -> None:
    served(tmp_path)
    from gradio import image_utils, processing_utils
    from gradio.data_classes import ImageData

    url = f"http://127.0.0.1:{site.port}/a.png"
    for public in (url, "https://example.com/a.png", "https://hf.co/a.png"):
        with pytest.raises(ValueError, match="not fetched"):
            asyncio.run(processing_utils.async_ssrf_protected_get(public))
        with pytest.raises(ValueError, match="not fetched"):
            asyncio.run(processing_utils.async_ssrf_protected_download(public, str(tmp_path)))
    component = gr.Image(type="pil")
    with pytest.raises(Exception):  # noqa: B017 - of what kind does not matter: nothing is asked for
        component.preprocess(ImageData(path=url, url=url))
    assert image_utils and site.seen == []


def test_a_picture_that_is_too_large_is_not_decoded(tmp_path: Path) -> None:
    served(tmp_path)
    size = 50_000
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb))


def test_a_key_is_asked_for_and_forgotten_when_it_is_removed(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    secret = keys.add("anna")
    app, server = served(tmp_path, tmp_path / "keys.json")
    with TestClient(app) as client:
        for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=x", "gradio_api/upload_progress"):
            assert client.get(f"/en/{path}").status_code == 401, path
        assert client.post("/en/gradio_api/upload", files={"files": b"x"}).status_code == 401
        for name, given in (("anna", "m6-no"), ("bob", secret), ("anna", "")):
            assert client.post("/en/login", data={"username": name, "password": given}).status_code in (400, 422)
        assert client.post("/en/login", data={"username": "anna", "password": secret}).status_code == 200
        assert client.get("/en/config").status_code == 200

    class Request:
        username = "anna"

    desk = Desk(server, "en")
    assert desk.key(Request()).name == "anna"
    with pytest.raises(gr.Error, match="a key that manages"):
        desk.manager(Request())
    keys.remove("anna")
    server.keys._seen = None
    with pytest.raises(gr.Error, match="valid no more"):
        desk.key(Request())


def test_a_box_is_drawn_into_the_picture(tmp_path: Path) -> None:
    desk, task = Desk(served(tmp_path)[1], "en"), told("grounding")
    with gr.Blocks():
        form, answer = Form(desk, "grounding", task), Answer(desk, task)
    white = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    asked = form.request([white, "杯子", *(option.value for option in form.options), 1, ""])
    event = {"value": [0.25, 0.25, 0.75, 0.75], "tokens": 4}
    text, pictures, _ = answer.whole(event, asked, 1.0, 0.5)
    drawn = np.asarray(pictures[0][0])
    side = len(drawn)
    assert text.startswith("[0.25") and (drawn[side // 4, side // 2] == (255, 0, 0)).all()
    assert (drawn[side // 8, side // 8] == 255).all()
