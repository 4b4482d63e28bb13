"""The proof of privacy: all that a served device sends or writes is recorded while its mode is changed under load.

The device runs in a process of its own. Its cloud is behind a recorder that keeps each byte; an audit hook of Python
notes each address that it connects to and each file that it opens for writing. In each mode new pictures, questions and
answers are used, so that what is found says when it was asked. The search covers all bytes of the wire, of all files in
the device's folder (the store with its journal, the log) and in its folder for temporary files, and of files that are
deleted and still open.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openm6.edge.cascade import CLOUD, EDGE
from openm6.edge.device import Settings, settings_toml
from tests.edge.conftest import CloudServer, Make, wait_until
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow

HOOK = """
import os, sys
_log = os.open(os.environ["AUDIT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def _note(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        os.write(_log, f"{event} {args[1]}\\n".encode())
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        os.write(_log, f"{event} {args[0]}\\n".encode())
    elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
        os.write(_log, f"open {os.path.abspath(os.fsdecode(args[0]))}\\n".encode())

sys.addaudithook(_note)
"""

STAGES = ("all", "features", "nothing", "all", "spoiled", "features", "nothing", "offline", "all", "nothing")
"""Modes in their order; `spoiled`: an edge.toml that cannot be used; `offline`: all, but nothing for now."""


class Recorder:
    """Passes on what comes to a server, and keeps each byte."""

    def __init__(self, port: int):
        self._to, self.sent = port, bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._pass_on, args=(inner, outer, self.sent), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(outer, inner, None), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, record: bytearray | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if record is not None:
                    record += data
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


class Secrets:
    """What is asked and answered in a stage, and the byte patterns by which it would be found."""

    def __init__(self, number: int):
        self.photo = picture(40, 24, seed=100 + number)
        self.question, self.answer = f"第{number}次的秘密问题是什么", f"第{number}次的秘密回答"

    def picture_patterns(self) -> list[bytes]:
        places = (len(self.photo) - back for back in (300, 200, 100))  # the first part of every JPEG is the same
        pixels = Image.open(io.BytesIO(self.photo)).convert("RGB").tobytes()
        parts = (*(self.photo[place : place + 90] for place in places), pixels[:90])
        return [form for part in parts for form in (part[:60], *_in_base64(part))]

    def text_patterns(self) -> list[bytes]:
        texts = (self.question, self.answer)
        forms = (lambda t: t.encode(), lambda t: json.dumps(t)[1:-1].encode(), lambda t: t.encode("utf-16-le"))
        return [form for text in texts for form in (*(to(text) for to in forms), *_in_base64(text.encode()))]


def _in_base64(part: bytes) -> list[bytes]:
    """As it stands in the base64 of something longer, from each of three places on."""
    return [base64.b64encode(part[start : start + len(part) // 3 * 3 - 3])[4:-4] for start in range(3)]


def _any(patterns: list[bytes], content: bytes) -> bool:
    return any(one in content for one in patterns)


class Load:
    """Clients that ask the device without a pause, each request with the stage's secrets of its beginning."""

    def __init__(self, url: str, secrets: list[Secrets]):
        self._url, self._secrets = url, secrets
        self.stage, self._stopped = 0, False
        self.replies: list[list[dict[str, Any]]] = [[] for _ in secrets]
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(3)]
        self._done = [[0] * len(self._threads) for _ in secrets]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        while not self._stopped:
            stage = self.stage
            one = self._secrets[stage]
            asked = {"inputs": {"photo": base64.b64encode(one.photo).decode(), "question": one.question}}
            request = urllib.request.Request(f"{self._url}/v1/tasks/vqa", json.dumps(asked).encode())
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    self.replies[stage].append(json.load(answer))
            except BaseException as error:
                self.failures.append(error)
                return
            self._done[stage][client] += 1

    def answered(self, count: int) -> None:
        """Wait until each client has been answered so many more times in this stage."""
        before = list(self._done[self.stage])
        wait_until(
            lambda: (
                bool(self.failures) or all(n >= b + count for n, b in zip(self._done[self.stage], before, strict=True))
            ),
            60,
        )
        assert not self.failures, self.failures

    def stop(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()


def _on_disk(folders: tuple[Path, ...], process: int | None = None) -> bytes:
    """All bytes of all files, and of those that are deleted and that a process has open."""
    found = []
    for folder in folders:
        for file in folder.rglob("*"):
            with suppress(FileNotFoundError):  # a journal that is gone by now
                found.append(file.read_bytes() if file.is_file() else b"")
    for handle in Path(f"/proc/{process}/fd").iterdir() if process else ():
        with suppress(OSError):
            if os.readlink(handle).endswith("(deleted)"):
                found.append(handle.read_bytes())
    return b"\n".join(found)


@pytest.fixture
def recorder(server: CloudServer) -> Iterator[Recorder]:
    found = Recorder(server.http.server_address[1])
    yield found
    found.close()


def test_nothing_leaves_or_stays_that_the_mode_forbids(
    device: Make, server: CloudServer, recorder: Recorder, tmp_path: Path
) -> None:
    secrets = [Secrets(number) for number in range(len(STAGES))]

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.startswith("/v1/edges/"):
            return 200, {}
        time.sleep(0.03)  # so that many are on their way when the mode changes
        number = next(n for n, one in enumerate(secrets) if one.question == body["inputs"]["question"])
        return 200, {"outputs": {"answer": secrets[number].answer}}

    server.act = answer
    settings = Settings(
        cloud=f"http://127.0.0.1:{recorder.port}", audit_rate=0.0001, requests_per_hour=10**6, statistics_minutes=0.01,
        deadline_ms=30_000,
    )  # fmt: skip
    opened = device(cloud=settings.cloud)
    place = opened.device.path
    opened.close()

    def change(mode: str) -> None:
        privacy = mode if mode in ("features", "nothing") else "all"
        text = settings_toml(replace(settings, offline=mode == "offline", privacy=privacy))
        (place / "edge.toml").write_text(text[: text.index("offline")] if mode == "spoiled" else text, "utf-8")

    temporary, hook, audit = tmp_path / "temporary", tmp_path / "hook", tmp_path / "audit"
    temporary.mkdir()
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    change(STAGES[0])
    process = subprocess.Popen(
        [sys.executable, str(place / "openm6-edge"), "serve", "--port", "0"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(hook), "AUDIT": str(audit), "TMPDIR": str(temporary),
             "PYTHONDONTWRITEBYTECODE": "1"},  # a new installation's first import writes .pyc files beside its modules
    )  # fmt: skip
    try:
        assert process.stdout is not None
        load = Load(process.stdout.readline().rpartition(" ")[2].strip(), secrets)
        for number, mode in enumerate(STAGES):
            change(mode)
            load.stage = number
            load.answered(1)  # what was asked before the change is answered too
            sent = len(recorder.sent)
            load.answered(4)
            wire, disk, one = bytes(recorder.sent), _on_disk((place, temporary), process.pid), secrets[number]
            silent = mode in ("nothing", "spoiled", "offline")
            assert _any(one.text_patterns(), wire) is not silent, (number, mode)
            assert _any(one.picture_patterns(), wire) is (mode == "all"), (number, mode)
            assert _any(one.text_patterns(), disk) is not silent, (number, mode)
            assert _any(one.picture_patterns(), disk) is (mode == "all"), (number, mode)
            by = {reply["by"] for reply in list(load.replies[number])}
            assert by == {EDGE} if silent else CLOUD in by, (number, mode)
            if silent:
                assert len(wire) == sent, (number, mode)
            if mode in ("features", "nothing"):  # of the stages before, too
                assert not any(_any(before.picture_patterns(), disk) for before in secrets), (number, mode)
            if mode == "nothing":
                assert not any(_any(before.text_patterns(), disk) for before in secrets), number
                assert b"__base64__" not in disk, number  # of features, too
            if not number:
                wait_until(lambda: b"/v1/edges/" in recorder.sent, 60)  # counts are reported, in this mode
        load.stop()
        assert not load.failures
    finally:
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout is not None
        process.stdout.close()
    disk = _on_disk((place, temporary))
    assert not any(_any([*one.picture_patterns(), *one.text_patterns()], disk) for one in secrets)
    noted = audit.read_text("utf-8").splitlines()
    assert {line for line in noted if not line.startswith("open ")} == {
        f"socket.connect ('127.0.0.1', {recorder.port})", "socket.getaddrinfo 127.0.0.1",
    }  # fmt: skip
    written_to = {Path(line.removeprefix("open ")) for line in noted if line.startswith("open ")}
    assert all(path.is_relative_to(tmp_path) or path == Path(os.devnull) for path in written_to), written_to
