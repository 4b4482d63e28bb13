"""Written characters: drawn alike each time, readable by their strokes, words of the test split its own."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.worlds.writing import HEIGHT, STROKES, write


def test_records_depend_on_seed_split_and_number_alone() -> None:
    few, more = (list(open_source(f"writing/train?records={n}")) for n in (5, 9))
    assert few == more[:5] != list(open_source("writing/train?records=5&seed=1"))
    for record in more:
        picture = Image.open(io.BytesIO(record["image"]))
        assert picture.size == (HEIGHT * len(record["text"]), HEIGHT) and 2 <= len(record["text"]) <= 4


@pytest.mark.slow
def test_words_of_the_test_split_are_its_own() -> None:
    train, test = ({r["text"] for r in open_source(f"writing/{s}?records=2000")} for s in ("train", "test"))
    assert not train & test and {c for t in train for c in t} == set(STROKES)


def test_strokes_lie_on_their_grid_and_no_two_characters_are_alike() -> None:
    for strokes in STROKES.values():
        for stroke in strokes.split():
            assert len(stroke.split(",")) >= 2 and all(len(c) == 2 and c.isdigit() for c in stroke.split(","))
    assert len(set(STROKES.values())) == len(STROKES) >= 40

    def ink(character: str, seed: int) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(write(character, np.random.default_rng(seed)))).convert("L"), float)
        return np.abs(pixels - np.median(pixels)) > 60

    # Drawn twice, a character is nearer to itself than to most others.
    drawn = {c: [ink(c, seed).astype(float) for seed in range(6)] for c in STROKES}
    means = {c: sum(one) / len(one) for c, one in drawn.items()}
    right = sum(
        min(means, key=lambda other: float(((means[other] - one) ** 2).sum())) == c
        for c, one in itertools.chain.from_iterable(((c, d) for d in many) for c, many in drawn.items())
    )
    assert right > 0.9 * 6 * len(STROKES)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="no split"):
        open_source("writing/dev")
