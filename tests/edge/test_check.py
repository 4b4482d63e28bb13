"""Checks of an edge device before it goes live: a line for each requirement, and an exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from openm6.edge.answer_store import new_key
from openm6.edge.cascade import Cascade
from openm6.edge.program import main
from openm6.edge.status import read_state
from openm6.serve.keys import Keys
from openm6.serve.server import Options
from openm6.serve.wire import Place
from tests.edge.conftest import ASKED, CloudServer, Make, interrupt_write, wait_until
from tests.serve.test_api import Served

pytestmark = pytest.mark.slow

SUBJECTS = ["package", "store", "disk", "key", "cloud", "model", "clock"]
PAGES = {"/v1/models": {"data": [{"id": "m6", "image_encoder": "0" * 16}]}, "/v1/tasks/vqa": {"outputs": ["answer"]}}


@pytest.fixture
def cloud(server: CloudServer, monkeypatch: pytest.MonkeyPatch) -> CloudServer:
    monkeypatch.setenv("M6_KEY", "secret")
    server.pages = lambda path: (200, PAGES[path]) if path in PAGES else (404, {"error": {"code": "task_not_found"}})
    return server


Serve = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def served() -> Iterator[Serve]:
    """Serves an edge device in a process of its own, which answers when this returns."""
    running: list[subprocess.Popen[str]] = []

    def serve(path: Path) -> subprocess.Popen[str]:
        words = [sys.executable, str(path / "openm6-edge"), "serve", "--port", "0"]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        assert running[-1].stdout is not None and "answers at" in running[-1].stdout.readline()
        return running[-1]

    yield serve
    for process in running:
        process.kill()
        process.communicate()


def _check(cascade: Cascade, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code, and the findings by their subjects."""
    cascade.close()
    with pytest.raises(SystemExit) as ended:
        main(["--package", str(cascade.device.path), "--json", "check"])
    return int(ended.value.code or 0), {one["subject"]: one for one in json.loads(capsys.readouterr().out)}


def test_all_is_well(device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str]) -> None:
    cascade = device(cloud=cloud.url, key="M6_KEY", keep_mb=1)
    cascade.answer("vqa", ASKED["vqa"])
    cascade.close()
    seen, content = len(cloud.seen), (cascade.device.path / "kept.sqlite").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["--package", str(cascade.device.path), "check"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and [line.split()[:2] for line in lines] == [["ok", one] for one in SUBJECTS]
    told = "\n".join(lines)
    assert "version 0001" in told and "calibrated: vqa" in told and "1 stored answers" in told and "secret" not in told
    assert {headers["Authorization"] for _, headers in cloud.read} == {"Bearer secret"}
    assert len(cloud.seen) == seen and (cascade.device.path / "kept.sqlite").read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "pages", "subject", "sentence"),
    [
        ({"key": "NO_KEY"}, {}, "key", r"\$NO_KEY is not set"),
        ({}, {"/v1/models": (401, {})}, "cloud", "refuses the key"),
        ({}, {"/v1/models": (200, [])}, "model", "not of the expected form"),
        ({"model": "m7"}, {}, "model", "no model 'm7'; it has: m6"),
        ({}, {"/v1/tasks/vqa": (404, {"error": {"code": "task_not_found"}})}, "model", "vqa: the cloud does not know"),
        ({}, {"/v1/tasks/vqa": (200, {"outputs": ["caption"]})}, "model", "other outputs"),
        ({"privacy": "features"}, {}, "model", "another image encoder"),
        ({"cloud": "http://127.0.0.1:9"}, {}, "cloud", "cannot be reached"),
        ({"keep_mb": 10**9}, {}, "disk", "MB are free"),
    ],
)
def test_what_would_fail_is_named(
    settings: dict[str, Any], pages: dict[str, Any], subject: str, sentence: str, device: Make, cloud: CloudServer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = cloud.pages
    cloud.pages = lambda path: pages.get(path) or whole(path)
    code, found = _check(device(**{"cloud": cloud.url, "keep_mb": 1, **settings}), capsys)
    assert code == 1 and [name for name, one in found.items() if one["fails"]] == [subject]
    assert re.search(sentence, found[subject]["message"])


def test_the_clock_is_compared_with_the_clouds(
    device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.date = formatdate(time.time() - 3600, usegmt=True)
    code, found = _check(device(cloud=cloud.url, keep_mb=1), capsys)
    assert code == 1 and found["clock"]["fails"] and "differs by 60.0 minutes" in found["clock"]["message"]
    cascade = device(cloud="", keep_mb=1)
    ahead = time.time() + 3600
    os.utime(cascade.device.folder() / "package/edge.json", (ahead, ahead))
    code, found = _check(cascade, capsys)
    assert code == 1 and found["clock"]["fails"] and "before the device was made" in found["clock"]["message"]


@pytest.mark.slow
def test_a_start_tries_the_cloud_until_edge_toml_is_changed(device: Make, cloud: CloudServer, served: Serve) -> None:
    """A key that is refused is logged; once privacy is stricter, nothing more is asked."""
    path = device(cloud=cloud.url, key="M6_KEY", keep_mb=1).device.path
    stricter = (path / "edge.toml").read_text("utf-8").replace('privacy = "all"', 'privacy = "nothing"')
    pages, log = cloud.pages, path / "edge.log"
    cloud.pages = lambda path: (401, {})
    process = served(path)
    wait_until(lambda: "FAILS  cloud" in log.read_text("utf-8"), 30)
    assert "refuses the key" in log.read_text("utf-8") and "secret" not in log.read_text("utf-8")
    [(page, headers)] = cloud.read
    assert page == "/v1/models" and headers["Authorization"] == "Bearer secret"
    process.terminate()
    assert process.wait(20) == 0
    log.unlink()

    def change(page: str) -> tuple[int, Any]:
        (path / "edge.toml").write_text(stricter, "utf-8")
        return pages(page)

    cloud.pages = change
    served(path)
    wait_until(lambda: "privacy 'all' -> 'nothing'" in log.read_text("utf-8"), 30)
    wait_until(lambda: (read_state(path) or {}).get("settings", {}).get("privacy") == "nothing", 30)
    assert [page for page, _ in cloud.read] == ["/v1/models"] * 2
    assert "FAILS" not in log.read_text("utf-8") and not cloud.seen


def test_an_edge_toml_that_cannot_be_used_tries_no_cloud(device: Make, cloud: CloudServer) -> None:
    cascade = device(cloud=cloud.url, keep_mb=1)
    (cascade.device.path / "edge.toml").write_text("privacy = some", "utf-8")
    assert "it is not asked (edge.toml cannot be used)" in next(cascade.check_cloud()).message
    assert not cloud.read


@pytest.mark.parametrize("settings", [{"privacy": "nothing"}, {"offline": True}])
def test_where_nothing_may_be_sent_nothing_is(
    settings: dict[str, Any], device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _check(device(cloud=cloud.url, keep_mb=1, **settings), capsys)
    assert code == 0 and "not asked" in found["cloud"]["message"] and not cloud.read and not cloud.seen


def test_what_a_start_would_do_to_the_kept_answers_is_said_before(
    device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    cascade = device(cloud=cloud.url, keep_mb=1)
    cascade.answer("vqa", ASKED["vqa"])
    cascade.close()
    file, keys = cascade.device.path / "kept.sqlite", cascade.device.path / "edge.toml"
    content, text = file.read_bytes(), keys.read_text("utf-8")
    monkeypatch.setenv("DEVICE_KEY", new_key())
    for before, after, sentence in (
        ('privacy = "all"', 'privacy = "nothing"', "a start deletes 1, which privacy = nothing forbids"),
        ('encrypt = ""', 'encrypt = "DEVICE_KEY"', "a start encrypts 1 in place"),
    ):
        keys.write_text(text.replace(before, after), "utf-8")
        code, found = _check(cascade, capsys)
        assert code == 0 and sentence in found["store"]["message"] and file.read_bytes() == content
    Cascade(cascade.device.path, 1).close()  # it is encrypted now
    monkeypatch.setenv("DEVICE_KEY", new_key())
    code, found = _check(cascade, capsys)
    assert code == 1 and "their key is another one" in found["store"]["message"]
    monkeypatch.delenv("DEVICE_KEY")
    assert "not set" in _check(cascade, capsys)[1]["store"]["message"]


def test_an_interrupted_write_is_told_and_left_to_a_start(
    device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str]
) -> None:
    cascade = device(cloud=cloud.url, keep_mb=1)
    for number in range(9):
        cascade.kept.keep("vqa", {"photo": bytes(9000), "question": str(number)}, "红色", "蓝色")
    cascade.close()
    interrupt_write(cascade.device.path / "kept.sqlite")
    before = {file: file.read_bytes() for file in cascade.device.path.glob("kept*")}
    code, found = _check(cascade, capsys)
    assert code == 0 and "was interrupted. A start undoes it" in found["store"]["message"]
    assert {file: file.read_bytes() for file in cascade.device.path.glob("kept*")} == before
    Cascade(cascade.device.path, 1).close()
    assert "9 stored answers" in _check(cascade, capsys)[1]["store"]["message"]


def test_a_damaged_store_is_told(device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str]) -> None:
    cascade = device(cloud=cloud.url, keep_mb=1)
    cascade.close()
    (cascade.device.path / "kept.sqlite").write_bytes(b"damaged" * 999)
    code, found = _check(cascade, capsys)
    assert code == 1 and found["store"]["fails"] and "not a database" in found["store"]["message"]


def test_a_damaged_device_is_told(device: Make, cloud: CloudServer, capsys: pytest.CaptureFixture[str]) -> None:
    cascade = device(cloud=cloud.url, keep_mb=1)
    (cascade.device.path / "edge.toml").write_text("privacy = 1", "utf-8")
    code, found = _check(cascade, capsys)
    assert code == 1 and list(found) == ["package"] and "edge.toml: privacy" in found["package"]["message"]


def test_against_a_real_server(
    device: Make, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(tmp_path / "keys.json")
    monkeypatch.setenv("M6_KEY", keys.add("device"))
    served = Served({"m6": Place(model)}, Options(keys=tmp_path / "keys.json"))
    try:
        for privacy in ("all", "features"):
            code, found = _check(device(cloud=served.url, key="M6_KEY", keep_mb=1, privacy=privacy), capsys)
            assert code == 0 and list(found) == SUBJECTS, found
        cascade = device(cloud=served.url, key="M6_KEY", keep_mb=1)
        cascade.answer("vqa", ASKED["vqa"])  # a model that was never trained may have nothing to say
        counts = cascade.statistics()["tasks"]["vqa"]
        assert counts["deferred"] == 1 and counts.get("unanswered", 0) == counts.get("unanswered_empty", 0)
        monkeypatch.setenv("M6_KEY", "m6-wrong")
        code, found = _check(cascade, capsys)
        assert code == 1 and "refuses the key" in found["cloud"]["message"]
        wrong = device(cloud=served.url, key="M6_KEY", keep_mb=1)
        assert {wrong.answer("vqa", ASKED["vqa"]).reason for _ in range(5)} == {"the cloud refuses the key"}
    finally:
        served.stop()
