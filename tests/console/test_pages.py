"""The console without a browser: its words, its forms, what it does not let through. (In one: tests/e2e.)"""

from __future__ import annotations

import ast
import asyncio
import base64
import io
import os
import re
import struct
import subprocess
import sys
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
from gradio.data_classes import ImageData
from PIL import Image

import openm6.console
from openm6.console import add_console, visitors_files
from openm6.console.context import PageContext, PageError, first_step, table
from openm6.console.forms import Answer, Form
from openm6.console.models import drawn
from openm6.console.site import PAGES, build
from openm6.core.errors import OpenM6Error, UsageError
from openm6.hub.catalogue import DATA, Lineage, Version
from openm6.hub.jobs import DONE, FAILED, RUNNING, STOPPED, WAITING
from openm6.serve.fleet import Fleet
from openm6.serve.keys import Keys
from openm6.serve.server import Options, Server
from openm6.tasks.drawn import ESTIMATES
from openm6.tasks.library import get, names
from tests.serve.test_security import Site
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow

FOLDER = Path(openm6.console.__file__).parent
SAYING = {"say", *(f"{one}.{word}" for one in ("ui", "self", "self.ui") for word in ("say", "error"))}
HAN = re.compile(r"[\u4e00-\u9fff]")


class Visitor:
    """A request of Gradio's, as far as the page looks at it."""

    username = "anna"


def press(site: gr.Blocks, button: str, *values: Any) -> list[Any]:
    """What an event of the component with this id fills its outputs with."""
    for function in site.fns.values():
        if any(getattr(site.blocks.get(block), "elem_id", None) == button for block, _ in function.targets):
            found = asyncio.run(function.fn(Visitor(), *values))
            return found if isinstance(found, list) else [found]
    raise AssertionError(button)


def alerts(found: list[Any]) -> str:
    """The errors among what is shown, as a text."""
    return " ".join(one for one in found if isinstance(one, str) and 'role="alert"' in one)


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
    said = {text for name, _, _, purpose in PAGES for text in (name, purpose)} | {
        WAITING,
        RUNNING,
        DONE,
        FAILED,
        STOPPED,
    }
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in SAYING and node.args:
                said |= {
                    c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
    chinese = yaml.safe_load((FOLDER / "zh.yaml").read_text("utf-8"))
    assert said == set(chinese)
    assert all(isinstance(text, str) and text for text in chinese.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_form_of_every_task_asks_what_its_example_says(tmp_path: Path, language: str) -> None:
    """Filled in by the button, as a browser would send it back."""
    ui = PageContext(served(tmp_path)[1], language)
    with gr.Blocks():  # its end takes a tenth of a second
        forms = {name: (Form(ui, name, told(name)), Answer(ui, told(name))) for name in names()}
    for name, (form, answer) in forms.items():
        filled = form.example() if form.slots else []
        filled = filled if len(form.slots) > 1 else [filled]
        values = []
        for field, value in zip(form.fields, filled, strict=len(form.slots) > 0):
            if isinstance(field, gr.Dataframe):
                sent = field.postprocess(value if field.headers is None else {"headers": field.headers, "data": value})
                value = field.preprocess(sent)
            if isinstance(value, Image.Image):
                value.save(tmp_path / "picture.png")
                value = str(tmp_path / "picture.png")
            values.append(value)
        asked = form.request([*values, *(option.value for option in form.options), 3, ""])
        assert set(asked.inputs) == set(get(name).inputs) & set(get(name).example), name
        assert "seed" not in asked.decoding
        assert asked.candidates == (3 if get(name).draws else 1)
        assert len(answer.nothing()) == len(answer.outputs)


def test_examples_are_lines_of_json(tmp_path: Path) -> None:
    ui = PageContext(served(tmp_path)[1], "en")
    with gr.Blocks():
        form = Form(ui, "reply", told("reply"))
    options = [option.value for option in form.options]
    rows = [["品类", "手套"], ["", ""]]
    asked = form.request([rows, "有吗", "", "", *options, 1, '{"history": "a", "reply": "b"}\n'])
    assert asked.inputs == {"attributes": {"品类": "手套"}, "history": "有吗"}
    assert asked.examples == [{"history": "a", "reply": "b"}]
    for wrong in ("no json", "[1]", "[" * 5000):
        with pytest.raises(PageError, match="Each example is one JSON object"):
            form.request([rows, "有吗", "", "", *options, 1, wrong])


def test_a_conversation_is_json_or_its_only_message(tmp_path: Path) -> None:
    ui = PageContext(served(tmp_path)[1], "en")
    with gr.Blocks():
        form = Form(ui, "chat", told("chat"))
    for text, expected in (
        (form.example(), get("chat").example["messages"]),
        ("[not json", [{"role": "user", "content": "[not json"}]),
        ("5", [{"role": "user", "content": "5"}]),
    ):
        asked = form.request([text, *(option.value for option in form.options), 1, ""])
        assert asked.inputs == {"messages": expected}


def test_options_that_are_left_out_are_not_sent(tmp_path: Path) -> None:
    ui, task = PageContext(served(tmp_path)[1], "en"), told("text_to_image")
    with gr.Blocks():
        form = Form(ui, "text_to_image", {**task, "decode": {"temperature": 0.6}})
    options = [option.value for option in form.options]
    assert form.request(["红色", *options, 1, ""]).decoding == {"passes": 8, "temperature": 0.6}
    assert form.request(["红色", "0", "", "", "7", 1, ""]).decoding == {"passes": 0, "seed": 7}
    with pytest.raises(PageError, match="An option has to be a number, not many"):
        form.request(["红色", "many", "", "", "", 1, ""])


def test_what_users_give_is_no_html(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    for language in ("en", "zh"):
        assert "<img" not in PageContext(served(tmp_path)[1], language).alert(UsageError(evil))
    assert "<img" not in table([evil], [[evil]], evil) + first_step(evil, evil)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty catalogue and an empty queue."""
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path / "home"))
    return tmp_path


MISSING = [
    ("submit", ("runs/demo/model", "vqa", "", "", "lora", 200, 16, "", ""), "training data|训练数据"),
    ("submit", ("", "vqa", "items.jsonl", "", "lora", 200, 16, "", ""), "base model|基座模型"),
    ("submit", ("runs/demo/model", None, "items.jsonl", "", "lora", 200, 16, "", ""), "task to train|任务"),
    ("submit", ("runs", "vqa", "items.jsonl", "", "lora", 200, 16, "", "a 'b"), "quotation mark|引号"),
    ("promote", (None,), "Choose a model|选择模型"),
    ("rollback", (None,), "Choose a model|选择模型"),
    ("accept", (None, 0), "Choose a batch|选择批次"),
    ("reject", (None, 0), "Choose a batch|选择批次"),
    ("finish", (None,), "Choose a batch|选择批次"),
    ("stop", (None,), "Choose a job|选择作业"),
    ("resume", (None,), "Choose a job|选择作业"),
    ("keep", (None, "goods"), "Choose a job|选择作业"),
]
"""A button, what is in its fields, and what it says."""


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_button_says_what_is_missing(home: Path, language: str) -> None:
    """In the language of the page alone, and nothing else is done."""
    ui = PageContext(served(home)[1], language, home)
    site = build(ui)
    for button, values, about in MISSING:
        told = alerts(press(site, button, *values))
        assert re.search(about, told) and bool(HAN.search(told)) == (language == "zh"), button
    assert ui.jobs.list() == []


def test_the_curve_of_a_job_that_has_just_begun_is_one_of_numbers(home: Path) -> None:
    """Gradio takes an empty column for words, and plots words from then on."""
    ui = PageContext(served(home)[1], "en", home)
    job = ui.jobs.submit(["finetune", "runs/demo/model", "--output", str(home / "run")])
    state, points, _ = press(build(ui), "job", job.id)[-3:]
    assert "waiting" in state
    told = gr.LinePlot(x="step", y="loss").postprocess(points)
    assert told is not None and told.datatypes == {"step": "quantitative", "loss": "quantitative"}


def test_an_error_stands_beside_the_field_that_it_names(home: Path) -> None:
    ui = PageContext(served(home)[1], "en", home)
    notes = {"photo": None, "question": None, "": None}
    assert [bool(one) for one in ui.beside(notes, UsageError("no", param="inputs.question"))] == [False, True, False]
    assert [bool(one) for one in ui.beside(notes, UsageError("no", param="decoding"))] == [False, False, True]
    assert [bool(one) for one in ui.beside(notes)] == [False, False, False]


def test_an_error_that_nobody_foresaw_is_a_sentence_too(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    ui = PageContext(served(home)[1], "en", home)
    assert "the server's log" in alerts([ui.alert(ui.unforeseen(ZeroDivisionError("secret")))]).lower()
    assert "ZeroDivisionError" in caplog.text


def test_a_file_that_is_no_picture_is_refused_with_the_reason(home: Path) -> None:
    """As the browser sends it: Gradio has put the file into its folder, and read nothing of it."""
    ui, task = PageContext(served(home)[1], "en"), told("vqa")
    with gr.Blocks():
        form = Form(ui, "vqa", task)
    file = home / "cup.png"
    for content in (b"no picture", picture()[:100], b""):
        file.write_bytes(content)
        path = form.fields[0].preprocess(ImageData(path=str(file), orig_name="cup.png"))
        with pytest.raises(PageError, match="cannot be read as a picture") as refused:
            form.request([path, "这是什么？", *(option.value for option in form.options), 1, ""])
        assert refused.value.param == "photo"
    file.write_bytes(picture())
    asked = form.request([str(file), "这是什么？", *(option.value for option in form.options), 1, ""])
    assert base64.b64decode(asked.inputs["photo"]) == file.read_bytes()


def test_tasks_and_slots_have_titles_in_words(home: Path) -> None:
    server = served(home)[1]
    for language in ("en", "zh"):
        ui = PageContext(server, language)
        titles = [ui.title(name, get(name).description) for name in names()]
        slots = {ui.slot(slot) for name in names() for slot in get(name).slots}
        assert len(set(titles)) == len(titles) and not any("_" in text for text in (*titles, *slots))
        assert all(bool(HAN.search(text)) == (language == "zh") for text in (*titles, *slots))
        assert ui.title("ours", "我们的任务：做某事") == "我们的任务" and ui.title("ours", "") == "ours"
        assert ui.slot("ours") == "ours"


def test_a_lineage_tells_a_long_path_by_its_end() -> None:
    source = "/mnt/storage/teams/goods/exports/reviews.jsonl"
    version = Version(DATA, "reviews", 1, 0.0, {"source": source, "records": 40, "hash": "0" * 16})
    assert re.search(r">40 × …[^<]*/reviews\.jsonl<", drawn(Lineage(version)))


def test_a_page_is_in_one_language(home: Path) -> None:
    """The link to the other one apart, and examples of a model's Chinese data."""
    server = served(home)[1]
    english, chinese = (build(PageContext(server, language, home)).get_config_file() for language in ("en", "zh"))
    said = [str(text) for one in english["components"] for text in texts_of(one["props"])]
    assert [text for text in said if HAN.search(text.replace("中文", ""))] == []
    said = [str(text) for one in chinese["components"] for key in ("label", "placeholder") for text in
            [one["props"].get(key)] if text and one["type"] != "html"]  # fmt: skip
    assert [text for text in said if not HAN.search(text) and not re.search(r"[/@.=]|^[a-z]+$", text)] == []


def texts_of(props: dict[str, Any]) -> Iterator[str]:
    for key in ("label", "placeholder", "info", "value", "headers"):
        if isinstance(props.get(key), str):
            yield props[key]


def test_every_page_links_to_itself_in_the_other_language(home: Path) -> None:
    app, _ = served(home)
    with TestClient(app) as client:
        for language, other in (("en", "zh"), ("zh", "en")):
            for _, path, _, _ in PAGES:
                assert f"../{other}/{path}" in client.get(f"/{language}/{path}").text.replace('\\"', '"')
                assert client.get(f"/{other}/{path}").status_code == 200


def test_what_visitors_upload_is_deleted_when_the_server_ends(home: Path) -> None:
    """And what a killed server has left when the next one begins. A server that still runs keeps its own."""
    code = (
        "import openm6.console as c, pathlib, sys; folder = c.visitors_files(); "
        "(folder / 'cup.png').write_bytes(b'secret'); print(folder, flush=True); sys.stdin.read()"
    )

    def begin() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(home)},
        )  # fmt: skip
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    running, own = begin()
    killed, left = begin()
    assert own.parent == home and own.stat().st_mode & 0o077 == 0
    killed.kill()
    killed.communicate()
    assert (left / "cup.png").exists()
    ended, last = begin()
    assert not left.exists() and (own / "cup.png").exists()
    for process, folder in ((running, own), (ended, last)):
        process.communicate()
        assert not folder.exists()


def test_uploads_go_to_a_folder_of_the_server_s_own(home: Path) -> None:
    app, _ = served(home)
    with TestClient(app) as client:
        found = client.post("/en/gradio_api/upload", files={"files": ("cup.png", picture())}).json()
        assert Path(found[0]).is_relative_to(visitors_files()) and Path(found[0]).is_file()
    assert not Path(found[0]).exists()


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

    url = f"http://127.0.0.1:{site.port}/a.png"
    for public in (url, "https://example.com/a.png", "https://hf.co/a.png"):
        with pytest.raises(ValueError, match="not fetched"):
            asyncio.run(processing_utils.async_ssrf_protected_get(public))
        with pytest.raises(ValueError, match="not fetched"):
            asyncio.run(processing_utils.async_ssrf_protected_download(public, str(tmp_path)))
    ui = PageContext(served(tmp_path)[1], "en")
    with gr.Blocks():
        form = Form(ui, "caption", told("caption"))
    path = form.fields[0].preprocess(ImageData(path=url, url=url))
    with pytest.raises(PageError, match="cannot be read as a picture"):
        form.request([path, *(option.value for option in form.options), 1, ""])
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

    ui = PageContext(server, "en")
    assert ui.key(Visitor()).name == "anna"
    with pytest.raises(OpenM6Error, match="the role manage"):
        ui.manager(Visitor())
    keys.remove("anna")
    with pytest.raises(OpenM6Error, match="no longer valid"):
        ui.key(Visitor())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_drawn_picture_says_what_the_model_thinks_of_it_in_the_pages_language(tmp_path: Path, language: str) -> None:
    ui, task = PageContext(served(tmp_path)[1], language), told("text_to_image")
    with gr.Blocks():
        form, answer = Form(ui, "text_to_image", task), Answer(ui, task)
    asked = form.request(["红", *(option.value for option in form.options), 2, ""])
    estimates = dict.fromkeys((*ESTIMATES, "reading"), 0.25)
    drawn = [{"image": picture(), "estimates": estimates, "score": score} for score in (0.5, 0.1)]
    _, pictures, _ = answer.whole({"value": drawn, "tokens": 4, "seed": 1}, asked, 1.0, 0.5)
    best, other = (caption for _, caption in pictures)
    assert best == ("best" if language == "en" else "最佳") + " · " + other
    assert other.count("0.2") == len(estimates)
    assert (HAN if language == "en" else re.compile("[A-Za-z]")).search(best) is None


def test_a_box_is_drawn_into_the_picture(tmp_path: Path) -> None:
    ui, task = PageContext(served(tmp_path)[1], "en"), told("grounding")
    with gr.Blocks():
        form, answer = Form(ui, "grounding", task), Answer(ui, task)
    white = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    white.save(tmp_path / "white.png")
    asked = form.request([str(tmp_path / "white.png"), "杯子", *(option.value for option in form.options), 1, ""])
    event = {"value": [0.25, 0.25, 0.75, 0.75], "tokens": 4}
    text, pictures, _ = answer.whole(event, asked, 1.0, 0.5)
    drawn = np.asarray(pictures[0][0])
    side = len(drawn)
    assert text.startswith("[0.25") and (drawn[side // 4, side // 2] == (255, 0, 0)).all()
    assert (drawn[side // 8, side // 8] == 255).all()
