"""`openm6 serve` as a process: started, asked, stopped in the midst of work; what it will not do."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from openm6 import Client
from tests.conftest import drawing_session
from tests.processes import free_port

ROOT = Path(__file__).parents[2]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "openm6", *map(str, words)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    drawing_session(tasks=("vqa", "text_to_image", "text_vector")).save(tmp_path / "goods" / "model")
    return tmp_path / "goods" / "model"


@pytest.mark.slow
def test_it_serves_and_finishes_what_it_works_at_when_it_is_stopped(model: Path) -> None:
    place = free_port()
    process = subprocess.Popen(
        command("serve", model, "--port", place), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    url, until = f"http://127.0.0.1:{place}", time.monotonic() + 120
    while True:
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                break
        except httpx2.TransportError:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
    m6 = Client(url, retries=0)
    assert [one["id"] for one in m6.models()] == ["goods"]
    assert len(list(m6.run_many("text_vector", [{"text": "红"}] * 20))) == 20
    Image.new("RGB", (16, 16), "red").save(model / "red.jpg")
    example = [sys.executable, str(ROOT / "examples" / "ask.py"), str(model / "red.jpg"), "这是什么?"]
    environment = {**os.environ, "OPENAI_BASE_URL": f"{url}/v1"}
    asked = subprocess.run(example, capture_output=True, text=True, env=environment, timeout=120)
    assert asked.returncode == 0 and asked.stdout.endswith("\n"), asked.stderr
    found: list[Any] = []
    slow = {"passes": 60, "guidance": 0}
    asking = threading.Thread(target=lambda: found.append(m6.run("text_to_image", caption="红", decoding=slow)))
    asking.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert found and found[0].size == (16, 16)
    assert process.wait(60) == 0
    told = process.stderr.read() + process.stdout.read()
    assert re.search(rf"Serving goods at {url} after \d+\.\d s \(console: {url}/\)\n", told)
    assert "Traceback" not in told and re.search('"path": "/v1/tasks/text_to_image", "status": 200', told)


@pytest.mark.slow
def test_it_is_not_open_to_others_without_keys(model: Path) -> None:
    for words, message in (
        (["serve", model, "--host", "0.0.0.0"], "give --keys FILE"),
        (["serve", model.parent], "is no OpenM6 model"),
        (["serve", model, model], "Two models are called goods"),
        (["serve", model, "--origin", "https://shop.example/"], "is not an origin of web pages"),
    ):
        done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"no weights")
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = other.getsockname()[1]
        done = subprocess.run(command("serve", model, "--port", place), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"Port {place} of 127.0.0.1 is taken" in done.stderr, done.stderr


@pytest.mark.slow
def test_keys_by_command(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def call(*words: object) -> str:
        done = subprocess.run(command("keys", *words, "--keys", file), capture_output=True, text=True, check=True)
        return done.stdout

    secret = call("add", "anna", "--role", "manage").strip()
    assert secret.startswith("m6-") and secret not in file.read_text()
    assert "anna" in call("list")
    call("remove", "anna")
    assert "anna" not in call("list")
