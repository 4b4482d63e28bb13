"""Features in the place of a picture: the same answers, in any batch, in training too; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openm6.compress.convert import quantize_model
from openm6.core.batch import pack, pad
from openm6.core.errors import DataError
from openm6.core.images import Features
from openm6.inference.session import Session
from openm6.model.files import image_encoder_id, load_model
from openm6.train.trainer import train
from tests.data.conftest import source_package
from tests.edge.conftest import model, session
from tests.tasks.conftest import picture, tokenizer
from tests.train.conftest import tiny_recipe

__all__ = ["model", "session", "tokenizer"]

QUESTION = "图中的商品是什么颜色？"


@torch.no_grad()
def _features(session: Session, photo: bytes) -> dict[str, Any]:
    pixels = session.processor.grid.read(photo)
    rows, columns = (side // session.processor.grid.stride for side in pixels.shape[:2])
    read = session.model.image(torch.from_numpy(pixels.copy())[None])
    return Features(read.numpy().astype(np.float16).tobytes(), rows, columns, "e").mapping()


def test_they_say_what_the_picture_says(session: Session) -> None:
    photos = [picture(40, 24, seed=1), picture(24, 40, seed=2), picture(seed=3)]
    task = session.task("vqa")
    plain = [session.prompt(task, {"photo": photo, "question": QUESTION}) for photo in photos]
    read = [session.prompt(task, {"photo": _features(session, photo), "question": QUESTION}) for photo in photos]
    assert all((a.ids == b.ids).all() for a, b in zip(plain, read, strict=True))
    mixed = [read[0], plain[1], read[2], plain[0]]
    for lay_out in (lambda some: pad(some, 0), lambda some: pack(some, 96, 0)):
        with torch.no_grad():
            expected = session.model(lay_out([plain[0], plain[1], plain[2], plain[0]])).hidden
            found = session.model(lay_out(mixed)).hidden
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert session.run("vqa", photo=_features(session, photos[0]), question=QUESTION) == session.run(
        "vqa", photo=photos[0], question=QUESTION
    )


def test_those_that_do_not_fit(session: Session) -> None:
    other = Features(bytes(2 * 4 * 16), 2, 2, "e").mapping()
    with pytest.raises(DataError, match="16 numbers a patch, not 32"):
        session.run("vqa", photo=other, question=QUESTION)
    with pytest.raises(DataError, match="25 patches"):
        session.run("vqa", photo=Features(bytes(2 * 25 * 32), 5, 5, "e").mapping(), question=QUESTION)


def test_an_image_encoder_has_an_id(model: Path, tmp_path: Path) -> None:
    assert len(image_encoder_id(model)) == 16
    other = Session.load(model, "cpu", trainable=True)
    with torch.no_grad():
        other.model.embed.weight.add_(1)
    other.save(tmp_path / "words")
    assert image_encoder_id(tmp_path / "words") == image_encoder_id(model)
    with torch.no_grad():
        other.model.image.row.add_(1)
    other.save(tmp_path / "encoder")
    assert image_encoder_id(tmp_path / "encoder") != image_encoder_id(model)
    quantize_model(model, tmp_path / "few", 8)
    assert len(image_encoder_id(tmp_path / "few")) == 16 and load_model(tmp_path / "few").image is not None


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_learning_from_them(frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside records with pictures: what reads pictures stays as it is where that is asked for."""
    train(tiny_recipe(tmp_path / "first", steps=1))
    first = Session.load(tmp_path / "first/model", trainable=True)
    records = [
        {"photo": _features(first, picture(32, 32, seed=n)), "question": QUESTION, "answer": "红色"} for n in range(8)
    ]
    source_package(tmp_path / "package", "features", monkeypatch).records.extend(records)
    data = [
        {"source": "features:all", "task": "vqa", "name": "features"},
        {"source": "demo:questions/train?pictures=30", "task": "vqa", "name": "pictures"},
    ]
    recipe = tiny_recipe(
        tmp_path / "then",
        data=data,
        model={"path": str(tmp_path / "first/model")},
        steps=4,
        freeze_image_encoder=frozen,
    )
    recipe = recipe.model_copy(update={"tokenizer": type(recipe.tokenizer)()})
    then = load_model(train(recipe)).state_dict()
    for name, weight in load_model(tmp_path / "first/model").state_dict().items():
        if name.startswith("image."):
            assert torch.equal(weight, then[name]) == frozen, name
    assert not torch.equal(then["embed.weight"], first.model.embed.weight)
