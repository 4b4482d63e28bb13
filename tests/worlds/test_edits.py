"""Edits: one attribute is another one, the rest of the picture is as it was, held-out combinations are asked for."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.worlds.draw import COLOURS, Item
from openm6.worlds.edits import VALUES, record
from openm6.worlds.pictured import HELD_OUT


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float)


def test_records_depend_on_seed_split_and_number_alone() -> None:
    few, more = (list(open_source(f"edits/train?pictures={n}")) for n in (4, 8))
    assert few == more[:4] != list(open_source("edits/train?pictures=4&seed=1"))
    with pytest.raises(UsageError, match="no split 'tst'"):
        open_source("edits/tst")


def test_what_is_asked_for_is_held_out_in_the_test_split_alone() -> None:
    for split in ("train", "test"):
        for index in range(100):
            found = record(0, split, index)
            item = Item(found["category"], found["colour"].removesuffix("色"), found["pattern"])
            assert (item in HELD_OUT) == (split == "test")
            assert getattr(item, found["kind"]) in found["request"] and found["kind"] in VALUES


def test_a_change_of_colour_changes_the_colour_and_nothing_else() -> None:
    checked = 0
    for index in range(200):
        found = record(0, "train", index)
        if found["kind"] != "colour" or found["pattern"] != "纯色":
            continue
        before, after = pixels(found["before"]), pixels(found["after"])
        changed = np.abs(before - after).max(2) > 40
        wanted = np.array(COLOURS[found["colour"].removesuffix("色")])
        assert 0.02 < changed.mean() < 0.8
        assert (
            np.median(np.abs(after[changed] - wanted).max(1)) < 60 < np.median(np.abs(before[changed] - wanted).max(1))
        )
        # JPEG blocks at the edge apart, what is not the goods is the same.
        assert np.median(np.abs(before - after)[~changed]) < 3
        checked += 1
    assert checked > 10
