"""A path that is not there is refused before a library looks for its name in the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import openm6
from openm6.compress.cascade import create_device
from openm6.core.bases import require_model
from openm6.core.errors import UsageError, suggest_path
from openm6.edge.device import Settings
from openm6.edge.package import export, export_image_encoder
from openm6.model.files import load_model, read_config
from openm6.tasks.pictures import PictureCodec
from tests.conftest import drawing_session


@pytest.fixture
def typo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path beside a model, one letter of which is wrong."""
    monkeypatch.chdir(tmp_path)
    drawing_session().save(tmp_path / "runs/goods/model")
    return Path("runs/godos/model")


OPENED: list[Callable[[Path], object]] = [
    openm6.load, load_model, read_config, require_model, PictureCodec.load,
    lambda path: export(path, Path("package")),
    lambda path: export_image_encoder(path, Path("encoder")),
    lambda path: create_device(Path("device"), path, Settings(), None),
    lambda path: create_device(Path("device"), Path("runs/goods/model"), Settings(), None, path),
]  # fmt: skip


@pytest.mark.parametrize("opened", OPENED)
def test_a_model_that_is_not_there_is_refused_with_the_nearest(opened: Callable[[Path], object], typo: Path) -> None:
    with pytest.raises(
        UsageError, match=r'godos/model is no .*: there is no such path. Did you mean "runs/goods/model"'
    ):
        opened(typo)
    assert not [name for name in ("package", "encoder", "device") if Path(name).exists()]


def test_the_nearest_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/summer").mkdir(parents=True)
    (tmp_path / "data/summer/train.jsonl").write_text("")
    assert suggest_path("data/summer/trian.jsonl") == ' Did you mean "data/summer/train.jsonl"?'
    assert suggest_path("dta/sumer/train.jsonl") == ' Did you mean "data/summer/train.jsonl"?'
    assert suggest_path(tmp_path / "data/sumer") == f' Did you mean "{tmp_path}/data/summer"?'
    for path in ("data/other", "data/summer/train.jsonl", "data/summer/train.jsonl/a", ""):
        assert suggest_path(path) == ""
