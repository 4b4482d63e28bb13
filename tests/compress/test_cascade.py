"""An edge device learns from the cloud's answers; a better version replaces the one before, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.compress.cascade import _stored_answers, _trained, calibrate_task, create_device, learn, open_kept_source
from openm6.core.errors import UsageError
from openm6.core.files import dumps, lock_output
from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.data.store import Record
from openm6.edge.answer_store import AnswerStore, is_held_out
from openm6.edge.cascade import Cascade
from openm6.edge.device import EdgeDevice, Settings, settings_toml
from openm6.edge.runner import EdgeModel
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.library import get
from openm6.tasks.processor import Processor
from tests.conftest import command, tiny_config
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow

COLOURS = ("红色", "蓝色")


def _photo(number: int) -> bytes:
    return picture(16, 16, seed=number)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One that the library's growth does not change: what a few steps learn depends on it."""
    return Tokenizer.train([f"{colour}的{number}是？" for colour in COLOURS for number in range(200)], 600, 16)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, qk_norm=True)
    place = tmp_path_factory.mktemp("cascade") / "model"
    Session(M6(config).eval(), Processor(tokenizer, ImageGrid(8, 16), 96), [get("vqa"), get("caption")]).save(place)
    return place


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which the answer stands in the question."""
    folder = tmp_path_factory.mktemp("known")
    lines = []
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(_photo(number))
        colour = COLOURS[number % 2]
        lines.append(dumps({"photo": f"{number}.jpg", "question": f"{colour}的{number}是？", "answer": colour}))
    (folder / "known.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "known.jsonl"


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "device"
    create_device(place, model, Settings(cloud="http://127.0.0.1:9"), None)
    return place


@pytest.fixture
def device(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "device"))


def _keep(device: Path, count: int, mode: str = "all", task: str = "vqa") -> None:
    opened = EdgeDevice(device)
    kept = AnswerStore(device / "kept.sqlite", mode, 10**8)
    encoder = EdgeModel(opened.folder() / "package").image_encoder
    for number in range(count):
        colour = COLOURS[number % 2]
        photo = _photo(number) if mode == "all" else encoder.features(_photo(number)).mapping()
        kept.keep(task, {"photo": photo, "question": f"{colour}的{number}是？"}, colour, "")
    kept.close()


@pytest.mark.slow
def test_a_round_learns_and_is_promoted(device: Path, known: Path) -> None:
    _keep(device, 120)
    found = learn(device, steps=60, batch_size=24, learning_rate=1e-2)
    told = found["tasks"]["vqa"]
    assert told["learned"] + told["held_out"] == 120 and told["held_out"] > 10
    assert told["held_out_after"] > 0.9 > told["held_out_before"]
    assert found["better"] and EdgeDevice(device).version == found["version"] == "0002"
    assert not (device / "learning").exists()
    edge = EdgeModel(device / "versions/0002/package")
    assert edge.run("vqa", photo=_photo(1), question="蓝色的1是？") == "蓝色"
    # It is what the model says, in PyTorch.
    assert Session.load(device / "versions/0002/model").run("vqa", photo=_photo(1), question="蓝色的1是？") == "蓝色"
    # Calibrated now, and taught what is wrong: that costs the known, and is not promoted.
    calibrate_task(EdgeDevice(device), "vqa", str(known), records=60)
    assert (device / "versions/0002/package/calibration-vqa.npz").is_file()
    kept = AnswerStore(device / "kept.sqlite", "all", 10**8)
    kept._file.execute("DELETE FROM answers")
    for number in range(120):
        asked = {"photo": _photo(number), "question": f"{COLOURS[number % 2]}的{number}是？"}
        kept.keep("vqa", asked, COLOURS[1 - number % 2], "")
    kept.close()
    found = learn(device, steps=60, batch_size=24, learning_rate=1e-2)
    assert found["tasks"]["vqa"]["held_out_after"] > 0.9 and found["tasks"]["vqa"]["after"] < 0.1
    assert not found["better"] and EdgeDevice(device).version == "0002" and not (device / "versions/0003").exists()


@pytest.mark.slow
def test_learning_from_features_keeps_the_image_encoder(device: Path, model: Path) -> None:
    (device / "edge.toml").write_text(settings_toml(Settings(privacy="features")), "utf-8")
    _keep(device, 100, "features")
    found = learn(device, steps=60, batch_size=24, learning_rate=1e-2)
    assert found["better"], found
    before, after = (
        Session.load(place, "cpu", trainable=True).model for place in (model, device / "versions/0002/model")
    )
    for name, weight in before.state_dict().items():
        same = torch.equal(weight, after.state_dict()[name])
        assert same == name.startswith("image."), name
    photo = _photo(1)
    content = b"".join(file.read_bytes() for file in device.rglob("*") if file.is_file())
    assert photo[40:] not in content


def test_kept_answers_are_a_source(device: Path) -> None:
    _keep(device, 50)
    sides = [open_kept_source(f"kept:{device}/vqa/{side}?until=40", None) for side in ("train", "held-out")]
    assert sum(map(len, sides)) == 40 and min(map(len, sides)) > 0
    record = sides[0][0]
    assert record["answer"] in COLOURS and record["photo"][:2] in (b"\xff\xd8", b"\x89P")
    assert not any(is_held_out({"record": {"photo": r["photo"], "question": r["question"]}}) for r in sides[0])
    with pytest.raises(UsageError, match="write kept:"):
        open_kept_source(f"kept:{device}/vqa/other", None)


def test_kept_answers_that_cannot_be_learned_from_are_skipped(device: Path, known: Path) -> None:
    _keep(device, 90)
    kept = AnswerStore(device / "kept.sqlite", "all", 10**8)
    for number, empty in enumerate(("", "  ", None)):
        kept.keep("vqa", {"photo": _photo(number), "question": "空的？"}, empty, "")
    kept.close()
    calibrate_task(EdgeDevice(device), "vqa", str(known), records=60)
    found = _stored_answers(EdgeDevice(device), "vqa", None)
    assert found.skipped["without an answer"] == 3
    # The first sixty kept questions are those of the calibration, which is measured on; the held-out ones stay.
    assert found.skipped["in the calibration"] == 60 - sum(_number(one) < 60 for one in found.held_out._records)
    assert all(_number(one) >= 60 for one in found.learned._records)
    assert len(found.learned) + len(found.held_out) + found.skipped.total() == 93
    with pytest.raises(UsageError, match="skipped: .* without an answer"):
        learn(device)


def _number(record: Record) -> int:
    return int("".join(filter(str.isdigit, record["question"])))


def test_what_a_version_is_measured_on_is_not_data(device: Path, known: Path) -> None:
    _keep(device, 60)
    calibrate_task(EdgeDevice(device), "vqa", str(known), records=60)
    renamed = known.with_name("renamed.jsonl")
    renamed.write_text("".join(known.read_text("utf-8").splitlines(True)[30:]), "utf-8")
    with pytest.raises(UsageError, match="has 30 of the 60 records that vqa was calibrated with"):
        command("cascade", "learn", device, "--data", f"vqa={renamed}")
    with pytest.raises(UsageError, match='no task vqaa. Did you mean "vqa"?'):
        command("cascade", "learn", device, "--data", f"vqaa={renamed}")
    assert not (device / "learning").exists()


def test_a_round_that_goes_on_has_its_data_in_the_same_order(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[Any] = []
    monkeypatch.setattr("openm6.train.trainer.train", recipes.append)
    plan = {
        "until": {"vqa": 9}, "data": {f"task_{n}": ["some.jsonl"] for n in range(9)},
        "steps": 5, "batch_size": 4, "learning_rate": 1e-3, "seed": 0,
    }  # fmt: skip
    _trained(EdgeDevice(device), plan, device / "learning")
    assert [section.task for section in recipes[0].data] == ["vqa", *plan["data"]]


def test_a_device_without_its_model_answers_and_says_that_it_cannot_learn(device: Path) -> None:
    before = EdgeModel(EdgeDevice(device).folder() / "package").run("vqa", photo=_photo(1), question="蓝色的1是？")
    _keep(device, 60)
    shutil.rmtree(device / "versions/0001/model")
    with closing(Cascade(device)) as cascade:
        assert cascade.answer("vqa", {"photo": _photo(1), "question": "蓝色的1是？"}).value == before
    with pytest.raises(UsageError, match="was copied without versions/0001/model"):
        learn(device)


def test_what_cannot_be_learned(device: Path, known: Path) -> None:
    with pytest.raises(UsageError, match="has 0 stored answers"):
        learn(device)
    with lock_output(device / "learning"), pytest.raises(UsageError, match="learning is being written by another"):
        learn(device)
    _keep(device, 20)
    with pytest.raises(UsageError, match="has 20 stored answers"):
        learn(device)
    (device / "edge.toml").write_text(settings_toml(Settings(privacy="nothing")), "utf-8")
    with pytest.raises(UsageError, match="sends nothing"):
        learn(device)
    with pytest.raises(UsageError, match="max_loss"):
        calibrate_task(EdgeDevice(device), "vqa", str(known), max_loss=2)
    with pytest.raises(UsageError, match="50 at least"):
        calibrate_task(EdgeDevice(device), "vqa", str(known), records=10)
    with pytest.raises(UsageError, match="--cloud-model"):
        create_device(device.with_name("other"), device / "versions/0001/model", Settings(privacy="features"))
    with pytest.raises(UsageError, match="exists already"):
        create_device(device, device / "versions/0001/model", Settings())


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", ["learning/run/checkpoints/*/state.json", "learning/version"])
def test_killed_it_goes_on(wait_for: str, device: Path) -> None:
    """kill -9 in the midst of training, and behind it: the version before answers, and the round is finished later."""
    _keep(device, 80)
    words = ["cascade", "learn", str(device), "--steps", "60", "--batch-size", "16", "--learning-rate", "3e-3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "openm6", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    for _ in range(2400):
        if list(device.glob(wait_for)) or process.poll() is not None:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if wait_for.endswith("json"):  # behind the training the kill may come too late
        assert EdgeDevice(device).version == "0001" and EdgeDevice(device).versions == ["0001"]
        plan = json.loads((device / "learning/plan.json").read_text())
        assert plan["from"] == "0001"
    assert (
        EdgeModel(EdgeDevice(device).folder() / "package").run("vqa", photo=_photo(0), question="红色的0是？")
        is not None
    )
    if (device / "learning").exists():
        assert CliRunner().invoke(commands(), words).exit_code == 0
    assert EdgeDevice(device).version == "0002" and not (device / "learning").exists()
    assert EdgeModel(device / "versions/0002/package").run("vqa", photo=_photo(1), question="蓝色的1是？") == "蓝色"


def test_the_commands(model: Path, known: Path, tmp_path: Path) -> None:
    run = partial(command, "cascade")
    place = tmp_path / "device"
    words = ["--cloud", "http://c:1", "--bits", "32", "--set", "keep_mb=7", "--set", "name=a"]
    words += ["--set", "privacy=nothing", "--set", "cloud=http://b:1", "--privacy", "all"]  # an option goes before it
    run("init", place, "--model", model, *words)
    assert EdgeDevice(place).settings == Settings(cloud="http://c:1", keep_mb=7, name="a")
    assert "% deferred, " in run("calibrate", place, "--task", "vqa", "--data", known, "--records", 60).output
    told = json.loads(run("status", place, "--json").output)
    assert (told["version"], told["calibrated"], told["kept"]["answers"]) == ("0001", ["vqa"], {})
    with pytest.raises(UsageError, match="no version before"):
        run("rollback", place)
    shutil.copytree(place / "versions/0001", place / "versions/0002")
    EdgeDevice(place).use("0002")
    assert "Version 0001 is live" in run("rollback", place).output
    with pytest.raises(UsageError, match='Did you mean "keep_mb"'):
        run("init", tmp_path / "x", "--model", model, "--set", "keep_m=7")
    with pytest.raises(UsageError, match="max-loss"):
        run("calibrate", place, "--task", "vqa", "--data", known, "--max-loss", "few")


def test_what_is_set_holds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, image_embedder="none")
    model, place = tmp_path / "model", tmp_path / "device"
    Session(M6(config), Processor(tokenizer, ImageGrid(8, 16), 96), [get("infilling")]).save(model)
    words = ["--bits", "32", "--set", "privacy=nothing", "--set", "cloud=", "--set", 'model=a"\\b', "--set", "name=007"]
    words += ["--set", "offline=true", "--set", "audit_rate=0.5", "--set", 'key="M6_KEY"']
    command("cascade", "init", place, "--model", model, *words)
    assert EdgeDevice(place).settings == Settings(
        privacy="nothing", name="007", model='a"\\b', offline=True, audit_rate=0.5, key="M6_KEY"
    )


def test_the_program_of_a_device(device: Path, tmp_path: Path) -> None:
    (device / "edge.toml").write_text(settings_toml(Settings(offline=True)), "utf-8")
    (tmp_path / "a.jpg").write_bytes(_photo(3))

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-I", str(device / "openm6-edge")]
        return subprocess.run([*start, *words], capture_output=True, text=True, cwd=tmp_path)

    told = json.loads(call("--json", "run", "vqa", "photo=a.jpg", "question=什么颜色").stdout)
    assert told["by"] == "edge" and told["probability"] is None and told["truncated"] == 0
    long = ("run", "vqa", "photo=a.jpg", f"question={'什么颜色' * 99}")
    assert "positions; the model takes" in call(*long).stderr
    assert json.loads(call("--json", *long, "--truncate", "start").stdout)["truncated"] > 0
    told = json.loads(call("status").stdout)
    assert (told["versions"], told["version"]) == (["0001"], "0001")
    assert told["kept"] == {"answers": {}, "bytes": 0, "trouble": "", "set_aside": []}
    assert json.loads(call("about").stdout)["version"] == "0001"
    assert "vqa: photo, question -> answer" in call("tasks").stdout
    assert len(call("new-key").stdout.strip()) == 44
    wrong = call("--package", str(tmp_path), "serve")
    assert wrong.returncode == 2 and "is not an edge device" in wrong.stderr
    assert np.all([v.isdigit() for v in EdgeDevice(device).versions])
