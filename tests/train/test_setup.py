"""The model of a recipe: its source, from the recipe, from the model that it starts from, or from a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.core.errors import UsageError
from openm6.inference.session import Session
from openm6.train.trainer import train
from tests.train.conftest import SIZES, losses, tiny_recipe

TEXTS = [{"source": "demo:texts/train?pictures=10", "task": "infilling"}]
CAUSAL = {"preset": "demo", "sizes": {**SIZES, "source": "causal"}}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe(tmp_path_factory.mktemp("causal"), model=CAUSAL, data=TEXTS, steps=1))


def source_of(model: Path) -> str:
    session = Session.load(model)
    assert session.processor.source == session.model.config.source
    return session.processor.source


def test_a_causal_source_is_trained_and_kept(causal: Path, tmp_path: Path) -> None:
    assert source_of(causal) == "causal"
    other = train(tiny_recipe(tmp_path, data=TEXTS, steps=1))
    assert losses(other.parent) != losses(causal.parent)  # the same weights and examples, read in another way


@pytest.mark.parametrize("wanted", [None, "causal", "bidirectional"])
def test_a_model_trained_on_with_another_source_is_told(
    causal: Path, tmp_path: Path, wanted: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"path": str(causal), "sizes": {} if wanted is None else {"source": wanted}}
    capsys.readouterr()
    assert source_of(train(tiny_recipe(tmp_path, model=start, data=TEXTS, steps=1))) == (wanted or "causal")
    told = f"The model {causal} had a causal source; it is trained on with a bidirectional one (model.sizes.source)."
    assert capsys.readouterr().err.splitlines().count(told) == (wanted == "bidirectional")


def test_a_student_reads_a_source_as_its_teacher_or_is_refused(causal: Path, tmp_path: Path) -> None:
    teach = {"data": TEXTS, "steps": 1, "distill": {"teacher": str(causal)}}
    assert source_of(train(tiny_recipe(tmp_path / "a", model={"preset": "demo", "sizes": SIZES}, **teach))) == "causal"
    other = {"preset": "demo", "sizes": {**SIZES, "source": "bidirectional"}}
    with pytest.raises(
        UsageError, match=r"has a causal source, the student a bidirectional one: .*model\.sizes\.source"
    ):
        train(tiny_recipe(tmp_path / "b", model=other, **teach))


def test_no_other_size_of_a_model_from_a_path_changes(causal: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keeps its hidden_size: only source can change"):
        tiny_recipe(tmp_path, model={"path": str(causal), "sizes": {"hidden_size": 64, "source": "causal"}})
    with pytest.raises(UsageError, match=r"with the source that it has: leave model.sizes out"):
        tiny_recipe(tmp_path, model={"path": str(causal), "sizes": {"source": "bidirectional"}}, adapt={})
    with pytest.raises(UsageError, match=r'model.source is "left"; it can be bidirectional, causal'):
        train(tiny_recipe(tmp_path / "c", model={"path": str(causal), "sizes": {"source": "left"}}, data=TEXTS))
