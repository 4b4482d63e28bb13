import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from openm6.core.errors import UsageError
from openm6.data.store import iterate
from openm6.worlds.digits import open_digits


def test_every_digit_is_in_one_split_and_each_class_in_the_same_share() -> None:
    train, test = list(iterate(open_digits("train"))), list(iterate(open_digits("test")))
    places = [r["_where"].partition("#")[2] for r in (*train, *test)]
    assert len(places) == len(set(places)) == 1797
    for digit in "0123456789":
        part = sum(r["label"] == digit for r in test)
        assert 0.18 < part / (part + sum(r["label"] == digit for r in train)) < 0.21


def test_a_picture_is_the_digit_enlarged_and_its_texts_name_it() -> None:
    data = load_digits()
    record = open_digits("train")[10]
    index = int(record["_where"].partition("#")[2])
    image = Image.open(io.BytesIO(record["image"]))
    assert image.size == (64, 64)
    small = 255 - np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32)
    assert np.corrcoef(small.ravel(), data.images[index].ravel())[0, 1] > 0.97
    assert record["answer"] == record["label"] == str(data.target[index])
    assert len(set(record["caption"])) >= 6
    assert all(record["label"] in caption for caption in record["caption"])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="train, test"):
        open_digits("dev")
