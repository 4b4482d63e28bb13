"""The status of an edge device, served or not; its log, and its service unit."""

from __future__ import annotations

import base64
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from configparser import RawConfigParser
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from openm6.core.errors import UsageError
from openm6.edge.device import EdgeDevice, Settings, settings_toml
from openm6.edge.opening import open_answer_store, open_store
from openm6.edge.program import main
from openm6.edge.service import Guard
from tests.conftest import command
from tests.edge.conftest import ASKED, interrupt_write, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "device"))


def _write(device: Path, **settings: Any) -> None:
    (device / "edge.toml").write_text(settings_toml(Settings(**settings)), "utf-8")


def _told(device: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["--package", str(device), "status"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _all_files(device: Path) -> dict[str, tuple[bytes, int]]:
    files = (file for file in device.rglob("*") if file.is_file())
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_status_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though edge.toml forbids by now what was kept."""
    with closing(open_answer_store(place, Settings())) as kept:
        kept.keep("vqa", {"photo": b"photo", "question": "?"}, "红色", "蓝色")
    _write(place, privacy="nothing", encrypt="NO_SUCH_VARIABLE")
    before = _all_files(place)
    told = _told(place, capsys)
    assert told["kept"]["answers"] == {"vqa": 1} and told["kept"]["bytes"] > 0
    assert told["serving"] is None and not told["problem"]
    assert told["settings"]["privacy"] == "nothing" and told["version"] == "0001" and told["calibrated"] == []
    assert json.loads(command("cascade", "status", place, "--json").output) == told
    assert "privacy" in command("cascade", "status", place).output
    assert _all_files(place) == before


def test_status_leaves_an_interrupted_write_to_a_start(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(open_answer_store(place, Settings())) as kept:
        for number in range(9):
            kept.keep("vqa", {"photo": bytes(9000), "question": str(number)}, "红色", "蓝色")
    interrupt_write(place / "kept.sqlite")
    before = _all_files(place)
    assert "was interrupted. A start undoes it" in _told(place, capsys)["kept"]["trouble"]
    assert _all_files(place) == before
    open_store(place, Settings()).close()
    assert _told(place, capsys)["kept"] | {"bytes": 0} == {
        "answers": {"vqa": 9}, "bytes": 0, "trouble": "", "set_aside": [],
    }  # fmt: skip


def test_status_of_a_device_that_is_not_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "edge.toml").write_text('privacy = "some"\n')
    (place / "kept.sqlite").write_bytes(os.urandom(5000))
    (place / "kept.sqlite.damaged-1").touch()
    told = _told(place, capsys)
    assert "all, features, nothing" in told["problem"] and told["settings"] == {}
    assert "is not a database" in told["kept"].pop("trouble")
    assert told["kept"] == {"answers": {}, "bytes": 0, "set_aside": ["kept.sqlite.damaged-1"]}
    (place / "edge.toml").unlink()
    with pytest.raises(SystemExit) as end:
        main(["--package", str(place), "status"])
    assert end.value.code == 2 and "is not an edge device" in capsys.readouterr().err


Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def served(place: Path) -> Iterator[Serve]:
    """Serves an edge device by the words of its service unit; returns the process, and where it answers."""
    running: list[subprocess.Popen[str]] = []

    def serve(*words: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        unit = subprocess.run(
            [sys.executable, str(place / "openm6-edge"), "unit", "--port", "0", *words], capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
        start = shlex.split(_parsed(unit)["Service"]["ExecStart"])
        process = subprocess.Popen(
            start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
        )
        running.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().rpartition(" ")[2].strip()

    yield serve
    for process in running:
        process.kill()
        process.communicate()


def _parsed(unit: str) -> RawConfigParser:
    parser = RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit)
    return parser


def _asked(url: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_what_serves_is_told_and_logged(place: Path, served: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    process, url = served("--key-env", "ASK_KEY", ASK_KEY="s3cret")
    status = _told(place, capsys)["serving"]
    assert status["url"] == url and status["process"] == process.pid and status["settings"] == asdict(Settings())
    asked = {"inputs": {"photo": base64.b64encode(ASKED["vqa"]["photo"]).decode(), "question": "机密的问题"}}
    assert _asked(url, "/v1/tasks/vqa", asked)[0] == 401
    assert _asked(url, "/v1/tasks/vqa", asked, "other")[0] == 401
    code, answer = _asked(url, "/v1/tasks/vqa", asked, "s3cret")
    assert code == 200 and answer["by"] == "edge"
    # Nobody asks any more, and the settings are taken up all the same.
    _write(place, privacy="nothing")
    wait_until(lambda: _told(place, capsys)["serving"]["settings"]["privacy"] == "nothing", 10)
    (place / "edge.toml").write_text("privacy = some\n", "utf-8")
    wait_until(lambda: "edge.toml" in _told(place, capsys)["serving"]["problem"], 10)
    _write(place, privacy="nothing")
    second = subprocess.run(
        [sys.executable, str(place / "openm6-edge"), "serve", "--port", "0"], capture_output=True, text=True
    )
    assert second.returncode == 2 and f"is served already, at {url}" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert _told(place, capsys)["serving"] is None
    log = (place / "edge.log").read_text("utf-8")
    for line in ("serves at http", "privacy 'all' -> 'nothing'", "Nothing is sent or stored", "stopped"):
        assert line in log
    assert not any(secret in log for secret in ("机密", asked["inputs"]["photo"][:60], "s3cret"))


@pytest.mark.slow
def test_what_serves_says_that_it_has_no_store(place: Path, served: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "kept.sqlite").mkdir()
    served()
    told = _told(place, capsys)
    assert "Nothing is stored" in told["serving"]["trouble"] and "cannot be used" in told["kept"]["trouble"]


@pytest.mark.slow
def test_a_killed_device_serves_no_longer(place: Path, served: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    process, _ = served()
    process.kill()
    process.wait()
    assert _told(place, capsys)["serving"] is None and (place / "serving.json").is_file()
    _, url = served()
    assert _told(place, capsys)["serving"]["url"] == url


def test_the_unit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / 'a $HOME 100% "b'
    shutil.move(place, odd)
    _write(odd, key="M6_KEY", encrypt="DEVICE_KEY", name="shop-1")
    main(["--package", str(odd), "unit", "--host", "0.0.0.0", "--key-env", "ASK_KEY"])
    unit = capsys.readouterr().out
    service = _parsed(unit)["Service"]
    words = shlex.split(service["ExecStart"].replace("%%", "%").replace("$$", "$"))
    assert words[1:] == [
        str(odd / "openm6-edge"), "serve", "--host", "0.0.0.0", "--port", "8100", "--key-env", "ASK_KEY",
    ]  # fmt: skip
    assert "M6_KEY, DEVICE_KEY, ASK_KEY" in unit and service["UMask"] == "0077" and service["Restart"] == "always"
    if verify := shutil.which("systemd-analyze"):
        file = tmp_path / "device.service"
        file.write_text(unit)
        said = subprocess.run([verify, "verify", str(file)], capture_output=True, text=True).stderr
        assert not [line for line in said.splitlines() if "device.service" in line], said


def test_a_failure_is_logged_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    """An error's message may repeat what was asked."""

    async def fail(*_: Any) -> None:
        raise ValueError("机密的问题")

    answer = TestClient(Guard(fail, "", True), base_url="http://127.0.0.1").get("/v1/status")
    assert answer.status_code == 500 and "see its log" in answer.json()["error"]["message"]
    assert "ValueError at" in caplog.text and "机密" not in caplog.text + answer.text
    assert caplog.records[-1].levelno == logging.ERROR


def test_a_device_that_does_not_start_says_why(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="is not an edge device"):
        EdgeDevice(place / "versions")
    _write(place, encrypt="NO_SUCH_VARIABLE")
    done = subprocess.run([sys.executable, str(place / "openm6-edge"), "serve"], capture_output=True, text=True)
    assert done.returncode == 2 and "NO_SUCH_VARIABLE" in done.stderr and "Traceback" not in done.stderr
    assert "not served" in (place / "edge.log").read_text("utf-8")
