"""An edge device beside a server of its cloud that answers as a test says."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openm6.compress.cascade import create_device
from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.edge.calibration import ConfidenceCalibrator
from openm6.edge.cascade import Cascade
from openm6.edge.device import Settings, settings_of, settings_toml
from openm6.edge.runner import EdgeModel
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.library import get
from openm6.tasks.processor import Processor
from tests.conftest import ExactSession, tiny_config
from tests.tasks.conftest import picture


class CloudServer:
    """A cloud that answers as a test says, and remembers what it was told."""

    def __init__(self, port: int = 0) -> None:
        self.pause = 0.0  # between the head of an answer and its body
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.act: Callable[[str, dict[str, Any]], tuple[int, Any]] = lambda path, body: (
            200, {"outputs": {"answer": "云"}},
        )  # fmt: skip
        self.read: list[tuple[str, dict[str, str]]] = []
        self.pages: Callable[[str], tuple[int, Any]] = lambda path: (404, {})
        self.open: list[socket.socket] = []
        self.date = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # it holds an answer's body back for 40 ms

            def setup(self) -> None:
                super().setup()
                outer.open.append(self.connection)

            def do_GET(self) -> None:
                outer.read.append((self.path, dict(self.headers)))
                self._say(*outer.pages(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append((self.path, body, dict(self.headers)))
                try:
                    status, answer = outer.act(self.path, body)
                except ConnectionAbortedError:
                    self.connection.close()
                    self.close_connection = True
                    return
                self._say(status, answer)

            def _say(self, status: int, answer: Any) -> None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response_only(status)
                self.send_header("date", outer.date or self.date_time_string())
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                time.sleep(outer.pause)
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def drop_connections(self) -> None:
        """As a server does that ends."""
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[CloudServer]:
    found = CloudServer()
    yield found
    found.close()


ASKED: dict[str, dict[str, Any]] = {
    "vqa": {"photo": picture(40, 24), "question": "图中的商品是什么颜色？"}, "caption": {"photo": picture(seed=1)},
    "text_classification": {"text": "很好"}, "item_vector": {"photo": picture(), "title": "红色的帽子"},
    "grounding": {"photo": picture(), "phrase": "帽子"},
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Of these tasks alone: the model is random, and a change of the library would make it another one."""
    texts = [text for name in ASKED for text in (*get(name).texts(), *map(str, get(name).example.values()))]
    characters = "红黄蓝绿色条纹圆点连衣裙帽子包图中的商品是什么左右上下边在有一二两件。，？"
    return Tokenizer.train(texts, 900, num_codes=16, alphabet=characters)


@pytest.fixture(scope="session")
def session(tokenizer: Tokenizer) -> Session:
    torch.manual_seed(4)
    config = tiny_config(vocab_size=tokenizer.vocab_size, image_embedder="stem", stem_widths=[8, 8, 16], qk_norm=True,
                         num_key_value_heads=2)  # fmt: skip
    tasks = [get(name) for name in ASKED if name != "text_classification"]
    tasks.append(get("text_classification").with_labels({"label": ["好", "不好", "还行"]}))
    made = ExactSession(M6(config).eval(), Processor(tokenizer, ImageGrid(8, 16), 96), tasks)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.mul_(3 if parameter.ndim == 2 and "image" not in name else 1)
    return made


@pytest.fixture(scope="session")
def model(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edge") / "model"
    session.save(place)
    return place


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edge device with the image encoder of its cloud; tests copy it."""
    place = tmp_path_factory.mktemp("device") / "device"
    create_device(place, model, Settings(), None, model)
    return place


@pytest.fixture(scope="session")
def package(made: Path) -> Path:
    """The ONNX bundle of `model` in 32 bits; tests copy it."""
    return made / "versions/0001/package"


QUESTIONS = [f"问题{number % 17}{'问' * (number % 5)}" for number in range(85)]
PHOTO = picture(40, 24)


def calibrate(package: Path, is_sure: bool) -> None:
    """Calibrate the task vqa: to QUESTIONS, which are all answered right, or to made-up states, of which none is."""
    model, rng = EdgeModel(package, 1), np.random.default_rng(0)
    states, confidences = rng.normal(size=(60, model.about["width"])), rng.uniform(0, 1, 60)
    if is_sure:
        answers = [model.answer("vqa", {"photo": PHOTO, "question": one}) for one in QUESTIONS]
        states, confidences = np.stack([one.state for one in answers]), np.array([one.confidence for one in answers])
    right = np.full(len(states), float(is_sure))
    fitted = ConfidenceCalibrator.fit(states.astype(np.float32), confidences, right, 0.01)
    fitted.save(package / "calibration-vqa.npz", model.about["sha256"])


Make = Callable[..., Cascade]


@pytest.fixture
def device(made: Path, tmp_path: Path) -> Iterator[Make]:
    opened: list[Cascade] = []

    def make(sure: bool = False, **settings: Any) -> Cascade:
        place = tmp_path / "device"
        if not place.exists():
            shutil.copytree(made, place)
        (place / "edge.toml").write_text(settings_toml(settings_of({"audit_rate": 0.0001, **settings})), "utf-8")
        calibrate(place / "versions/0001/package", sure)
        opened.append(Cascade(place, 1, seed=0))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def count_learned(cascade: Cascade) -> int:
    """Number of answers on the disk that calibrators have learned."""
    with contextlib.closing(sqlite3.connect(cascade.kept.file)) as file:
        return file.execute("SELECT COUNT(*) FROM seen").fetchone()[0]


def interrupt_write(store: Path) -> None:
    """Kill a process in the middle of a write to the stored answers, some pages of which are on the disk already."""
    code = (
        "import os, signal, sqlite3, sys\n"
        "file = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for line in ('PRAGMA journal_mode=TRUNCATE', 'PRAGMA cache_size=1', 'BEGIN', 'DELETE FROM answers'):\n"
        "    file.execute(line)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(store)]).returncode == -signal.SIGKILL
    assert store.with_name(f"{store.name}-journal").stat().st_size


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    for _ in range(round(seconds / 0.05)):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")
