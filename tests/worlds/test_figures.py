import io
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from openm6.core.errors import UsageError
from openm6.data.columns import map_columns
from openm6.data.source import open_source
from openm6.data.store import iterate
from openm6.tasks.library import get
from openm6.worlds.draw import COLOURS, PATTERNS, SIDE, Item, Placed, look_of
from openm6.worlds.figures import GARMENTS, PICTURES, clothes_for, figure_of, open_figures, paint, record, worn
from openm6.worlds.phrases import attributes_in
from openm6.worlds.pictured import HELD_OUT

ITEMS = [Item(*names) for names in product(GARMENTS, COLOURS, PATTERNS)]
items = st.sampled_from(ITEMS)
seeds = st.integers(0, 2**32 - 1)


def item_of(found: dict) -> Item:
    return Item(found["category"], found["colour"].removesuffix("色"), found["pattern"])


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)), np.float32)


def alike(picture: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture has the hue of a colour, whatever the light: by the shares of red, green and blue."""
    wanted, seen = np.array(COLOURS[colour], np.float32), picture + 1
    return np.linalg.norm(seen / seen.sum(2, keepdims=True) - wanted / wanted.sum(), axis=2) < 0.06


def test_a_record_has_three_pictures_a_caption_and_the_names_of_its_garment() -> None:
    assert PICTURES == {"train": 24_000, "validation": 400, "test": 400, "varied": 24_000}
    records = open_figures("train", pictures=30)
    assert len(records) == 30
    assert records.columns == ("person", "garment", "result", "category", "pattern", "colour", "caption")
    for found in iterate(records):
        for name in ("person", "garment", "result"):
            assert found[name][:2] == b"\xff\xd8" and pixels(found[name]).shape == (SIDE, SIDE, 3)
        item = item_of(found)
        assert attributes_in(found["caption"]) == [
            {"category": item.category, "colour": item.colour, "pattern": item.pattern}
        ]
    assert {r["category"] for r in iterate(records)} == set(GARMENTS)
    slots = ("person", "garment", "result")
    assert map_columns(get("try_on"), records.columns, {}, [records[0]]) == {name: name for name in slots}


def test_the_same_seed_gives_the_same_records_and_another_seed_others() -> None:
    assert record(3, "train", 7) == record(3, "train", 7) == open_figures("train", 3, 8)[7]
    for other in (record(4, "train", 7), record(3, "test", 7), record(3, "train", 8)):
        assert other["person"] != record(3, "train", 7)["person"]


@pytest.mark.slow
def test_varied_garments_have_colours_of_their_own() -> None:
    shares = {}
    for split in ("train", "varied"):
        rows = open_figures(split, pictures=80)
        plain = [pixels(found["garment"])[24:40, 30:34] for found in iterate(rows) if found["pattern"] == "纯色"]
        strange = [max(alike(cloth, name).mean() for name in COLOURS) < 0.2 for cloth in plain]
        shares[split] = np.mean(strange)
    assert set(rows.columns) == {"person", "garment", "result", "category", "pattern"}
    assert shares["train"] == 0 and shares["varied"] > 0.3, shares


@pytest.mark.parametrize("split", ("train", "validation", "test"))
def test_only_the_test_split_shows_the_combinations_held_out_by_the_catalogue(split: str) -> None:
    assert all((item_of(record(0, split, i)) in HELD_OUT) == (split == "test") for i in range(30))
    rng = np.random.default_rng(0)
    shown = [clothes_for(split, item, rng) for item in ITEMS for _ in range(4)]
    kinds = {kind for clothes in shown for kind in clothes}
    assert kinds == {*GARMENTS, "背心", "短裤"}
    assert all((one in HELD_OUT) == (split == "test") for clothes in shown for one in clothes.values() if one)


@settings(max_examples=30, deadline=None)
@given(items, items, seeds)
def test_a_person_in_other_clothes_differs_in_the_clothes_alone(first: Item, second: Item, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outfits = [{one.category: look_of(Placed(one, 0.5, 0.5, 0.8), rng)} for one in (first, second)]
    canvas, light = rng.uniform(0, 255, (SIDE, SIDE, 3)), np.ones((SIDE, SIDE, 1))
    figure = figure_of((200, 200, 200), rng)
    before, after = paint(canvas, figure, outfits, light)
    covered = sum(share for outfit in outfits for kind in outfit for share, _ in worn(figure, kind, outfit[kind])) > 0
    assert np.array_equal(before[~covered], after[~covered])
    assert 0.05 < covered.mean() < 0.5


def test_the_result_is_the_same_picture_but_for_the_garment() -> None:
    """JPEG codes 8 x 8 pixels at a time: what stands in other blocks than the garment is equal to the byte."""
    kept = {"T恤": (slice(0, 8), slice(48, 64)), "裤子": (slice(0, 32),), "连衣裙": (slice(0, 8),)}
    for index in range(60):
        found = record(0, "train", index)
        person, result = pixels(found["person"]), pixels(found["result"])
        for rows in kept[found["category"]]:
            assert np.array_equal(person[rows], result[rows])
        assert np.abs(person - result)[:, [0, 1, -2, -1]].max() < 30
        assert 0.03 < (np.abs(person - result).max(2) > 30).mean() < 0.5


@pytest.mark.slow
def test_the_garment_has_in_the_result_the_colour_of_its_picture() -> None:
    for split, index in product(("train", "test"), range(60)):
        found = record(0, split, index)
        colour = found["colour"].removesuffix("色")
        if colour == "黑":  # has no hue
            continue
        person, garment, result = (pixels(found[name]) for name in ("person", "garment", "result"))
        changed = np.abs(person - result).max(2) > 30
        lying, dressed = alike(garment, colour), alike(result, colour) & changed
        assert dressed.mean() > 0.005
        assert np.abs(garment[lying].mean(0) - result[dressed].mean(0)).max() < 35


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_garment_on_a_person_shows_its_pattern(pattern: str) -> None:
    """As large a part of the cloth carries marks as in the pattern itself, and it is in places unmixed."""
    for category, seed in product(GARMENTS, range(5)):
        rng = np.random.default_rng(seed)
        look = look_of(Placed(Item(category, "红", pattern), 0.5, 0.5, 0.84), rng)
        (cloth, _), (marks, _), _ = worn(figure_of((200, 200, 200), rng), category, look)
        square = np.mgrid[0:200, 0:200] / 200 - 0.5
        expected = np.mean(look.marks(square[1], square[0]))
        assert abs(marks.sum() / (cloth + marks).sum() - expected) < 0.12
        assert pattern == "纯色" or (marks.max() > 0.6 and cloth.max() > 0.95)


def test_the_source_is_opened_by_name_and_a_mistake_says_what_there_is() -> None:
    source = open_source("tryon/test?pictures=3&seed=2")
    assert len(source) == 3 and source[1] == record(2, "test", 1)
    for name, told in (
        ("tryon/dev", "no split 'dev'.* train, validation, test"), ("tryon/tests", 'Did you mean "test"'),
        ("tryon/train?pictures=x", "whole numbers"), ("tryon/train?colour=red", "unknown option colour"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            open_source(name)
    with pytest.raises(UsageError, match="not streamed"):
        open_source("tryon/train", stream=True)
