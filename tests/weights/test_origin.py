"""Licences: read from a checkpoint's papers, kept by model directories, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm6.compress.convert import import_model, quantize_model
from openm6.inference.session import Session
from openm6.weights.origin import read_origin
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
