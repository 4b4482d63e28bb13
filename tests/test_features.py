"""Features in the place of a picture: the same answers, in any batch, in training too; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openm6.batches import pack, pad
from openm6.bundle import Bundle
from openm6.convert import quantize_bundle
from openm6.data.source import ADDED
from openm6.data.store import ListRecords
from openm6.errors import DataError
from openm6.images import Features
from openm6.model.files import eyes_of, load_model
from openm6.train.trainer import train
from tests.edge.test_edge import _in_fp32, bundle, model
from tests.tasks.conftest import picture, tokenizer
from tests.train.conftest import tiny_recipe

__all__ = ["_in_fp32", "bundle", "model", "tokenizer"]

QUESTION = "图中的商品是什么颜色？"


@torch.no_grad()
def _features(bundle: Bundle, photo: bytes) -> dict[str, Any]:
    pixels = bundle.processor.grid.read(photo)
    rows, columns = (side // bundle.processor.grid.stride for side in pixels.shape[:2])
    read = bundle.model.image(torch.from_numpy(pixels.copy())[None])
    return Features(read.numpy().astype(np.float16).tobytes(), rows, columns, "e").mapping()


def test_they_say_what_the_picture_says(bundle: Bundle) -> None:
    photos = [picture(40, 24, seed=1), picture(24, 40, seed=2), picture(seed=3)]
    task = bundle.task("vqa")
    plain = [bundle.prompt(task, {"photo": photo, "question": QUESTION}) for photo in photos]
    read = [bundle.prompt(task, {"photo": _features(bundle, photo), "question": QUESTION}) for photo in photos]
    assert all((a.ids == b.ids).all() for a, b in zip(plain, read, strict=True))
    mixed = [read[0], plain[1], read[2], plain[0]]
    for lay_out in (lambda some: pad(some, 0), lambda some: pack(some, 96, 0)):
        with torch.no_grad():
            expected = bundle.model(lay_out([plain[0], plain[1], plain[2], plain[0]])).hidden
            found = bundle.model(lay_out(mixed)).hidden
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert bundle.run("vqa", photo=_features(bundle, photos[0]), question=QUESTION) == bundle.run(
        "vqa", photo=photos[0], question=QUESTION
    )


def test_those_that_do_not_fit(bundle: Bundle) -> None:
    other = Features(bytes(2 * 4 * 16), 2, 2, "e").mapping()
    with pytest.raises(DataError, match="16 numbers a patch, not 32"):
        bundle.run("vqa", photo=other, question=QUESTION)
    with pytest.raises(DataError, match="25 patches"):
        bundle.run("vqa", photo=Features(bytes(2 * 25 * 32), 5, 5, "e").mapping(), question=QUESTION)


def test_eyes_have_a_name(model: Path, tmp_path: Path) -> None:
    assert len(eyes_of(model)) == 16
    other = Bundle.load(model, "cpu", trainable=True)
    with torch.no_grad():
        other.model.embed.weight.add_(1)
    other.save(tmp_path / "words")
    assert eyes_of(tmp_path / "words") == eyes_of(model)
    with torch.no_grad():
        other.model.image.row.add_(1)
    other.save(tmp_path / "eyes")
    assert eyes_of(tmp_path / "eyes") != eyes_of(model)
    quantize_bundle(model, tmp_path / "few", 8)
    assert len(eyes_of(tmp_path / "few")) == 16 and load_model(tmp_path / "few").image is not None


@pytest.mark.parametrize("frozen", [True, False])
def test_learning_from_them(frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside records with pictures: what reads pictures stays as it is where that is asked for."""
    train(tiny_recipe(tmp_path / "first", steps=1))
    first = Bundle.load(tmp_path / "first/model", trainable=True)
    records = [
        {"photo": _features(first, picture(32, 32, seed=n)), "question": QUESTION, "answer": "红色"} for n in range(8)
    ]
    monkeypatch.setitem(ADDED, "features", lambda name: ListRecords(records))
    data = [
        {"source": "features:all", "task": "vqa", "name": "features"},
        {"source": "demo:questions/train?pictures=30", "task": "vqa", "name": "pictures"},
    ]
    recipe = tiny_recipe(
        tmp_path / "then", data=data, model={"path": str(tmp_path / "first/model")}, steps=4, freeze_pictures=frozen
    )
    recipe = recipe.model_copy(update={"tokenizer": type(recipe.tokenizer)()})
    then = load_model(train(recipe)).state_dict()
    for name, weight in load_model(tmp_path / "first/model").state_dict().items():
        if name.startswith("image."):
            assert torch.equal(weight, then[name]) == frozen, name
    assert not torch.equal(then["embed.weight"], first.model.embed.weight)
