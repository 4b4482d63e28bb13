"""The catalogue: versions that are whole, what they were made of, which one is live; two processes at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.bases import directory_hash
from openm6.core.environment import HOME
from openm6.core.errors import OpenM6Error, UsageError
from openm6.data.source import open_source
from openm6.hub.catalogue import DATA, LIVE, MODEL, Catalogue
from openm6.hub.find import find_model
from openm6.inference.session import Session
from openm6.model.adapters import OwnConfig
from tests.conftest import drawing_session

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow  # a database is made in seconds


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return Catalogue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "model"
    drawing_session().save(place)
    return place


def records(file: Path, count: int = 5) -> Path:
    lines = [json.dumps({"text": f"红色{number}", "price": number}, ensure_ascii=False) for number in range(count)]
    file.write_text("\n".join(lines), "utf-8")
    return file


def test_a_data_set_is_known_by_what_is_in_it(catalogue: Catalogue, tmp_path: Path) -> None:
    file = records(tmp_path / "goods.jsonl")
    first = catalogue.add_data("goods", str(file))
    assert (first.kind, first.name, first.number) == (DATA, "goods", 1)
    assert first.about["records"] == 5 and first.about["columns"] == {"text": "str", "price": "int"}
    assert catalogue.add_data("goods", str(file)) == first
    second = catalogue.add_data("goods", str(records(file, 6)))
    assert second.number == 2 and second.about["hash"] != first.about["hash"]
    assert [v.number for v in catalogue.versions(DATA, "goods")] == [1, 2] and catalogue.names(DATA) == ["goods"]
    assert catalogue.named("data:goods@1") == first and catalogue.named("goods", DATA) == second


def test_a_model_tells_what_it_was_made_of(catalogue: Catalogue, model: Path, tmp_path: Path) -> None:
    data = catalogue.add_data("goods", str(records(tmp_path / "goods.jsonl")))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: demo\n", "utf-8")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 0.5, "energy_kwh": 0.25}) + "\n", "utf-8")
    base = catalogue.add_model("base", model, made_of=["data:goods"], run=run, metrics={"accuracy": 0.9})
    tuned = catalogue.add_model("replies", model, made_of=["base@1", "data:goods@1"])
    assert base.made_of == ((DATA, "goods", 1),) and base.about["energy_kwh"] == 0.25
    assert base.about["metrics"] == {"accuracy": 0.9}
    told = catalogue.lineage(tuned)
    assert [one.version.full_name for one in told.made_of] == ["base@1", "goods@1"]
    lines = told.lines()
    assert lines[0] == "model replies@1" and lines[1] == "  model base@1" and lines[2].startswith("    data goods@1")
    assert str(tmp_path / "goods.jsonl") in lines[2] and data.about["hash"][:12] in lines[2]


def test_the_base_of_an_adapter_is_known_by_its_weights(catalogue: Catalogue, model: Path, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(model, tmp_path / "base"), tmp_path / "adapter"
    Session.load(base).describe(adapter, OwnConfig("prompt", str(base), length=2))
    version = catalogue.add_model("replies", adapter)
    assert version.about["base"] == {"path": str(base), "hash": directory_hash(base)}
    assert str(base) in catalogue.lineage(version).lines()[0]
    assert find_model("replies@1") == (catalogue.local(version), "replies")
    weights = base / "model.safetensors"
    *first, last = weights.read_bytes()
    weights.write_bytes(bytes([*first, last ^ 1]))
    with pytest.raises(OpenM6Error, match="has changed since"):
        find_model("replies@1")
    done = CliRunner().invoke(commands(), ["models", "fetch", "replies", str(tmp_path / "copy")])
    assert done.exit_code == 0 and "has changed since" in done.stderr
    shutil.rmtree(base)
    with pytest.raises(OpenM6Error, match="which is not there"):
        find_model("replies@1")
    with pytest.raises(UsageError, match="which is not there"):
        catalogue.add_model("replies", adapter)
    of_the_catalogue = catalogue.local(catalogue.add_model("goods", model))
    Session.load(of_the_catalogue).describe(tmp_path / "other", OwnConfig("prompt", str(of_the_catalogue), length=2))
    told = catalogue.lineage(catalogue.add_model("other", tmp_path / "other")).lines()
    assert told[1] == "  model goods@1"


def test_a_model_is_found_by_its_directory_or_its_name(
    catalogue: Catalogue, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_model(model) == (model.resolve(), model.parent.name)
    with pytest.raises(UsageError, match="the catalogue is empty"):
        find_model("goods@live")
    assert not Path(catalogue.database.removeprefix("sqlite:///")).exists()
    catalogue.promote(catalogue.add_model("goods", model))
    assert find_model("goods@live")[1] == "goods" and find_model("goods@1")[0] == find_model("goods@live")[0]
    with pytest.raises(UsageError, match='There is no model god. Did you mean "goods"?'):
        find_model("god@live")
    with pytest.raises(UsageError, match='goods has no version liv; it has 1 to 1. Did you mean "live"?'):
        find_model("goods@liv")
    done = CliRunner().invoke(commands(), ["run", "goods@live", "text_vector", "text=红", "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["answer"]) == 32
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "goods@live")
    assert find_model("goods@live")[0] == tmp_path / "goods@live"
    shutil.rmtree(catalogue.artifacts)
    catalogue.promote(catalogue.add_model("goods", model))
    shutil.rmtree(catalogue.artifacts)
    with pytest.raises(OpenM6Error, match="The files of goods@2 cannot be fetched from"):
        find_model("goods@2")


def test_one_version_is_live_and_the_one_before_is_told(catalogue: Catalogue, model: Path, tmp_path: Path) -> None:
    first, second = (catalogue.add_model("goods", model, note=note) for note in "ab")
    assert catalogue.promote(first) is None
    assert catalogue.named(f"goods@{LIVE}").number == 1
    before = catalogue.promote(second)
    assert before is not None and before.number == 1
    assert catalogue.rollback("goods").number == 1 == catalogue.named("goods@live").number
    assert catalogue.rollback("goods").number == 2
    with pytest.raises(UsageError, match="was test before"):
        catalogue.rollback("goods", "test")
    assert catalogue.named("goods@live").number == 2 and catalogue.named("goods@live").aliases == (LIVE,)
    fetched = catalogue.fetch(catalogue.named("goods@live"), tmp_path / "copy")
    assert Session.load(fetched).run("text_vector", text="红").shape == (32,)
    assert {p.name for p in fetched.iterdir()} == {p.name for p in model.iterdir()}


def test_what_cannot_be_is_told(catalogue: Catalogue, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no model goods"):
        catalogue.named("goods")
    catalogue.add_model("goods", model)
    with pytest.raises(UsageError, match="no version 7; it has 1 to 1"):
        catalogue.named("goods@7")
    for name in ("../goods", "a/b", "", "a" * 200, "x' OR 1"):
        with pytest.raises(UsageError, match="is not a valid name"):
            catalogue.add_model(name, model)
    with pytest.raises(UsageError, match="is not a model directory"):
        catalogue.add_model("goods", tmp_path)
    with pytest.raises(UsageError, match="There is no data nothing"):
        catalogue.add_model("goods", model, made_of=["data:nothing"])
    with pytest.raises(UsageError, match="exists already"):
        catalogue.fetch(catalogue.named("goods"), model)
    with pytest.raises(OpenM6Error, match="cannot be opened") as error:
        Catalogue("postgresql+psycopg://anna:secret@127.0.0.1:1/none").names(MODEL)
    assert "secret" not in str(error.value)


def test_two_processes_at_once_get_numbers_of_their_own(catalogue: Catalogue, model: Path) -> None:
    catalogue.add_model("goods", model)
    code = (
        "import sys; from pathlib import Path; from openm6.hub.catalogue import Catalogue\n"
        "for _ in range(3): Catalogue().add_model('goods', Path(sys.argv[1]))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(model)]) for _ in range(2)]
    assert [one.wait(180) for one in both] == [0, 0]
    assert [v.number for v in catalogue.versions(MODEL, "goods")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_model_whose_files_cannot_be_stored_is_not_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    catalogue = Catalogue(f"sqlite:///{tmp_path / 'catalogue.db'}", str(tmp_path / "file" / "artifacts"))
    with pytest.raises(OSError, match="file"):
        catalogue.add_model("goods", model)
    assert catalogue.versions(MODEL, "goods") == [] and catalogue.names(MODEL) == []


def test_the_commands(catalogue: Catalogue, model: Path, tmp_path: Path) -> None:
    def call(*words: object) -> Any:
        done = CliRunner().invoke(commands(), [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    file = records(tmp_path / "goods.jsonl")
    assert call("data", "add", "goods", file)["version"] == 1 == call("data", "add", "goods", file)["version"]
    assert call("data", "list")[0]["records"] == 5 and call("data", "show", "goods@1")["columns"]["price"] == "int"
    for _ in range(2):
        call("models", "add", "replies", model, "--made-of", "data:goods@1", "--metric", "bleu=31.5")
    assert [one["version"] for one in call("models", "list")] == [1, 2]
    assert call("models", "promote", "replies@1")["before"] is None
    assert call("models", "promote", "replies@2")["before"] == 1
    assert call("models", "rollback", "replies")["version"] == 1
    assert call("models", "rollback", "replies")["version"] == 2
    shown = call("models", "show", "replies@live")
    assert shown["version"] == 2 and shown["metrics"] == {"bleu": 31.5} and shown["made_of"] == ["data:goods@1"]
    assert str(file) in call("models", "lineage", "replies@live")[1]
    assert (Path(call("models", "fetch", "replies", tmp_path / "out")["directory"]) / "config.json").is_file()
    for words in (("models", "list"), ("data", "list"), ("models", "lineage", "replies"), ("data", "show", "goods")):
        assert CliRunner().invoke(commands(), list(words)).exit_code == 0


def test_a_data_set_is_kept_with_what_reading_it_was_told(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("1,茶葉很香\n".encode("big5"))
    version = catalogue.add_data("tea", str(tmp_path / "a.csv"), "?encoding=big5&names=id,text", "photos")
    about = catalogue.named("tea", DATA).about
    assert (about["format"], about["images"]) == (version.about["format"], "photos")
    assert open_source(about["source"], about["format"])[0]["text"] == "茶葉很香"
