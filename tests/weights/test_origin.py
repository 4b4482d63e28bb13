"""Licences: read from a checkpoint's papers, kept by model directories, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.compress.convert import export_model, import_model, prune_model, quantize_model, upcycle_model
from openm6.edge.package import export
from openm6.inference.session import Session
from openm6.tasks.card import read_origin as kept_origin
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from openm6.weights.origin import licence_note, papers, read_origin
from tests.conftest import command
from tests.weights.checkpoints import network, save

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
LLAMA = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024\n"
CARD = "---\nlicense: other\nlicense_name: qwen-research\nbase_model:\n- Qwen/Qwen2.5-3B\ntags: [chat]\n---\n# Qwen\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"README.md": "# No front matter\nlicense: mit\n"}, {}),
        ({"README.md": "---\nlicense: [\n---\n"}, {}),
        ({"README.md": "---\n- a list\n---\n"}, {}),
        ({"README.md": CARD, "LICENSE": APACHE},
         {"license": "other", "license_name": "qwen-research", "base_model": "Qwen/Qwen2.5-3B"}),
        ({"README.md": "# Nothing", "LICENSE": APACHE}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright ..."}, {"license": "mit"}),
        ({"LICENSE": LLAMA, "USE_POLICY.md": "x"},
         {"license": "other", "license_name": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"}),
    ],
)  # fmt: skip
def test_licences_are_read_from_a_checkpoints_papers(
    files: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    assert read_origin(tmp_path) == {"name": tmp_path.name, **expected}


def test_a_licence_stays_with_the_model_and_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path / "home"))
    path = save(network("llama"), tmp_path / "Llama-1B")
    (path / "LICENSE").write_text(LLAMA)
    import_model(path, tmp_path / "m6", "none", 0, 64)
    assert (tmp_path / "m6" / "LICENSE").read_text() == LLAMA
    quantize_model(tmp_path / "m6", tmp_path / "few", 8)
    Session.load(tmp_path / "m6", trainable=True).save(tmp_path / "again")
    origin = {"name": "Llama-1B", "license": "other", "license_name": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"}
    for name in ("m6", "few", "again"):
        shown = command("models", "show", str(tmp_path / name), "--json")
        assert json.loads(shown.stdout)["origin"] == origin, name
    assert "LLAMA 3.2 COMMUNITY" in command("models", "show", str(tmp_path / "m6")).stdout


def restricted(path: Path, name: str, text: str) -> Path:
    """The model directory of a checkpoint with this licence."""
    theirs = save(network("llama", num_hidden_layers=2), path / name)
    (theirs / "LICENSE").write_text(text)
    import_model(theirs, path / f"{name}-m6", "none", 0, 64)
    return path / f"{name}-m6"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, Llama-m6 and Mit-m6, and data."""
    path = tmp_path_factory.mktemp("licences")
    restricted(path, "Llama", LLAMA)
    restricted(path, "Mit", "MIT License\n\nCopyright")
    lines = [json.dumps({"question": f"the cat {n}", "answer": "the dog"}) for n in range(8)]
    (path / "data.jsonl").write_text("\n".join(lines), "utf-8")
    return path


def trained(place: Path, output: Path, **sections: Any) -> Path:
    train(check_recipe({
        "name": "x", "output": output,
        "data": [{"source": str(place / "data.jsonl"), "task": "question_answering"}],
        "train": {"steps": 1, "batch_size": 2, "row_length": 64, "workers": 0, "precision": "fp32"}, **sections,
    }))  # fmt: skip
    return output / "model"


ORIGIN = {"name": "Llama", "license": "other", "license_name": LLAMA.splitlines()[0]}
TEACHER = {f"teacher_{key}": value for key, value in ORIGIN.items()}
SMALL = {
    "preset": "demo",
    "sizes": {"hidden_size": 16, "num_hidden_layers": 1, "image_embedder": "none", "image_max_patches": 256},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["all weights", "adapter", "merged", "student", "student with a licence"])
def test_training_keeps_licences(way: str, place: Path, tmp_path: Path) -> None:
    llama, mit = place / "Llama-m6", place / "Mit-m6"
    expected, files = ORIGIN, {"LICENSE": LLAMA}
    if way == "all weights":
        path = trained(place, tmp_path / "run", model={"path": str(llama)})
    elif way in ("adapter", "merged"):
        path = trained(place, tmp_path / "run", model={"path": str(llama)}, adapt={"method": "lora"})
        if way == "merged":
            command("models", "merge", path, tmp_path / "merged")
            path = tmp_path / "merged"
    elif way == "student":
        path, expected = trained(place, tmp_path / "run", model=SMALL, distill={"teacher": str(llama)}), TEACHER
        files = {"LICENSE.teacher": LLAMA}
    else:
        path = trained(place, tmp_path / "run", model={"path": str(mit)}, distill={"teacher": str(llama)})
        expected = {"name": "Mit", "license": "mit", **TEACHER}
        files = {"LICENSE": "MIT License\n\nCopyright", "LICENSE.teacher": LLAMA}
    assert kept_origin(path) == expected
    assert {file.name: file.read_text() for file in papers(path)} == files
    shown = command("models", "show", str(path)).stdout
    assert "licence of Llama" in shown and ("licence of Mit" in shown) == (way == "student with a licence")


@pytest.mark.parametrize("way", ["quantized", "upcycled", "pruned"])
def test_conversions_keep_licences(way: str, place: Path, tmp_path: Path) -> None:
    path, output = place / "Llama-m6", tmp_path / "out"
    if way == "quantized":
        quantize_model(path, output, 8)
    elif way == "upcycled":
        upcycle_model(path, output, 2, 2, "topk", 1)
    else:
        prune_model(path, output, "question_answering", str(place / "data.jsonl"), {}, 4, layers=1)
    assert kept_origin(output) == ORIGIN and (output / "LICENSE").read_text() == LLAMA


@pytest.mark.slow
def test_a_bundle_keeps_licences(place: Path, tmp_path: Path) -> None:
    session = Session.load(place / "Llama-m6", trainable=True)
    session.tasks["question_answering"] = session.task("question_answering")
    session.save(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "bundle")
    assert kept_origin(tmp_path / "bundle") == ORIGIN and (tmp_path / "bundle" / "LICENSE").read_text() == LLAMA


def test_an_export_has_a_model_card(place: Path, tmp_path: Path) -> None:
    export_model(place / "Llama-m6", tmp_path / "back", "huggingface")
    card = (tmp_path / "back" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "license": "other", "license_name": ORIGIN["license_name"], "base_model": "Llama",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["openm6"],
    }  # fmt: skip
    assert (tmp_path / "back" / "LICENSE").read_text() == LLAMA
    again = read_origin(tmp_path / "back")
    assert again == {**ORIGIN, "name": "back", "base_model": "Llama"}


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, ""),
        ({"name": "Mit", "license": "mit"}, ""),
        ({"name": "Llama", "license": "other", "license_name": "llama3"}, "(Llama: other, llama3)"),
        ({"name": "x"}, "(x: unknown)"),
        (
            {"name": "Mit", "license": "mit", "teacher_name": "T", "teacher_license": "cc-by-nc-4.0"},
            "(T: cc-by-nc-4.0)",
        ),
    ],
)
def test_those_who_deploy_a_model_are_told_of_its_licence(origin: dict[str, str] | None, expected: str) -> None:
    note = licence_note(origin)
    assert expected in note if expected else not note


def test_deploy_tells_it(place: Path, tmp_path: Path) -> None:
    for name, told in (("Llama-m6", True), ("Mit-m6", False)):
        found = command("deploy", place / name, "--to", "compose", "--output", tmp_path / name)
        assert ("Read the licence of these weights" in found.stderr) == told


def test_a_checkpoint_in_the_cache_of_the_hub_has_its_name_there(tmp_path: Path) -> None:
    path = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    path.mkdir(parents=True)
    assert read_origin(path) == {"name": "Qwen/Qwen3-0.6B"}
