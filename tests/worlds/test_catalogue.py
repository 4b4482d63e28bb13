import io
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from openm6.core.errors import UsageError
from openm6.data.store import iterate
from openm6.worlds import phrases
from openm6.worlds.catalogue import open_catalogue, picture, same_attributes
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, SIDE, Item, Placed, draw_picture
from openm6.worlds.phrases import OPPOSITE, attributes_in
from openm6.worlds.pictured import HELD_OUT

ITEMS = [Item(k, c, p) for k, c, p in product(CATEGORIES, COLOURS, PATTERNS)]
TRAINED = [item for item in ITEMS if item not in HELD_OUT]
items = st.sampled_from(ITEMS)
seeds = st.integers(0, 2**32 - 1)


def named(text: str) -> set[Item]:
    return {Item(**found) for found in attributes_in(text)}


def test_a_fifth_of_the_combinations_is_held_out_and_every_pair_is_left_in_training() -> None:
    assert len(ITEMS) == 8 * 8 * 4
    assert 0.19 < len(HELD_OUT) / len(ITEMS) < 0.21
    assert {(i.category, i.colour) for i in TRAINED} == set(product(CATEGORIES, COLOURS))
    assert {(i.category, i.pattern) for i in TRAINED} == set(product(CATEGORIES, PATTERNS))
    assert {(i.colour, i.pattern) for i in TRAINED} == set(product(COLOURS, PATTERNS))
    assert {i.category for i in HELD_OUT} == set(CATEGORIES)


@pytest.mark.parametrize(
    ("split", "allowed"), [("train", set(TRAINED)), ("validation", set(TRAINED)), ("test", HELD_OUT)]
)
def test_no_text_of_a_split_names_a_combination_of_the_other_side(split: str, allowed: set[Item]) -> None:
    for view in ("catalogue", "texts"):
        for record in iterate(open_catalogue(view, split, pictures=150)):
            for text in (
                [record["text"]] if view == "texts" else [*record["caption"], record["title"], record["slogan"]]
            ):
                complete = [found for found in attributes_in(text) if len(found) == 3]
                assert {Item(**found) for found in complete} <= allowed, text


def test_the_same_seed_gives_the_same_records_and_another_seed_others() -> None:
    assert picture(3, "train", 7) == picture(3, "train", 7)
    assert picture(3, "train", 7)["image"] != picture(4, "train", 7)["image"]
    assert picture(3, "train", 7)["image"] != picture(3, "test", 7)["image"]


def test_about_a_third_of_the_pictures_have_two_objects_of_different_categories() -> None:
    records = list(iterate(open_catalogue(pictures=400)))
    two = [r for r in records if r["objects"] == 2]
    assert 0.22 < len(two) / len(records) < 0.38
    assert all(len({row["品类"] for row in r["attributes"]}) == 2 for r in two)
    assert {r["relation"] for r in two} == set(OPPOSITE)


@given(items, seeds)
def test_every_caption_of_one_item_names_its_three_attributes(item: Item, seed: int) -> None:
    written = phrases.captions((item,), "", np.random.default_rng(seed))
    assert len(set(written)) == 6
    assert all(named(text) == {item} for text in written)


@given(items, items, st.sampled_from(list(OPPOSITE)), seeds)
def test_every_caption_of_two_items_names_all_their_attributes(first: Item, second: Item, side: str, seed: int) -> None:
    if first.category != second.category:
        written = phrases.captions((first, second), side, np.random.default_rng(seed))
        assert len(set(written)) == 6
        assert all(named(text) == {first, second} for text in written)


def test_a_caption_is_right_only_with_all_attributes_at_their_items() -> None:
    truth = "红色条纹连衣裙在蓝色圆点帽子的左边。"
    assert same_attributes("右边是一顶圆点的蓝色帽子，左边是红色的条纹连衣裙。", truth)
    assert not same_attributes("蓝色条纹连衣裙在红色圆点帽子的左边。", truth)
    assert not same_attributes("红色条纹连衣裙。", truth)
    assert not same_attributes("红色连衣裙在蓝色圆点帽子的左边。", truth)
    assert not same_attributes("", truth)


@given(items, items, st.sampled_from(list(OPPOSITE)), seeds)
def test_answers_are_true_and_both_items_are_asked_about(first: Item, second: Item, side: str, seed: int) -> None:
    if first.category == second.category:
        return
    asked = list(phrases.questions((first, second), side, np.random.default_rng(seed)))
    assert {q.kind for q in asked} == {"count", "relation", "category", "colour", "pattern"}
    for q in asked:
        if q.kind == "relation":
            # The item that is placed comes first, except after "compared with".
            order = sorted((first, second), key=lambda i: q.question.index(i.category))
            subject = order[1] if q.question.startswith("相对于") else order[0]
            assert q.answer == (side if subject == first else OPPOSITE[side])
        elif q.detail in ("named", "placed"):
            by_side = {side: first, OPPOSITE[side]: second}
            word = next(w for w in (*by_side, first.category, second.category) if w in q.question)
            item = by_side.get(word) or (first if word == first.category else second)
            assert q.answer == phrases.answer_of(item, q.kind)


def test_each_kind_of_question_is_put_in_several_ways() -> None:
    ways: dict[str, set[str]] = {}
    for record in iterate(open_catalogue("questions", pictures=150)):
        plain = record["question"].rstrip("?？")
        for name in (*CATEGORIES, *(c + "色" for c in COLOURS), *OPPOSITE):
            plain = plain.replace(name, "*")
        ways.setdefault(record["kind"], set()).add(plain)
    assert set(ways) == {"colour", "category", "pattern", "count", "relation"}
    assert all(len(w) >= 3 for w in ways.values())


def test_a_question_carries_its_picture() -> None:
    pictures, questions = open_catalogue(pictures=20), open_catalogue("questions", pictures=20)
    assert len(questions) > 4 * 20 - 1
    assert questions[0]["image"] == pictures[0]["image"]
    assert questions[-1]["image"] == pictures[-1]["image"]


@settings(max_examples=40, deadline=None)
@given(items.filter(lambda item: item.colour != "黑"), st.floats(0.35, 0.85), seeds)
def test_an_item_shows_in_its_colour(item: Item, size: float, seed: int) -> None:
    """Brightness is jittered, so colours are compared by direction (black has none)."""
    plain = Item(item.category, item.colour, "纯色")
    image = Image.open(io.BytesIO(draw_picture([Placed(plain, 0.5, 0.5, size)], np.random.default_rng(seed))))
    assert image.size == (SIDE, SIDE)
    pixels = np.asarray(image, np.float32).reshape(-1, 3) + 1
    colour = np.array(COLOURS[item.colour], np.float32)
    alike = pixels / np.linalg.norm(pixels, axis=1, keepdims=True) @ (colour / np.linalg.norm(colour))
    assert (alike > 0.97).mean() > 0.02


def test_positions_and_sizes_vary() -> None:
    """The place of the strongest deviation from the background moves over the picture."""
    centres = []
    for index in range(60):
        record = picture(0, "train", index)
        if record["objects"] == 1:
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])), np.float32)
            far = np.abs(pixels - np.median(pixels, axis=(0, 1))).sum(2) > 120
            rows, columns = np.nonzero(far)
            centres.append((rows.mean() / SIDE, columns.mean() / SIDE))
    spread = np.array(centres).std(0)
    assert (spread > 0.05).all()


def test_items_are_the_pictures_of_one_item_with_its_attributes() -> None:
    items, pictures = open_catalogue("items", pictures=40), open_catalogue(pictures=40)
    alone = [r for r in iterate(pictures) if r["objects"] == 1]
    assert [(r["image"], r["category"], r["colour"], r["pattern"]) for r in iterate(items)] == [
        (r["image"], r["attributes"][0]["品类"], r["attributes"][0]["颜色"], r["attributes"][0]["图案"]) for r in alone
    ]
    assert items.columns == ("image", "caption", "category", "colour", "pattern")


def test_pairs_are_both_items_of_the_pictures_of_two_each_with_its_side() -> None:
    expected = []
    for record in iterate(open_catalogue(pictures=40)):
        if record["objects"] == 2:
            places = record["relation"], OPPOSITE[record["relation"]]
            for place, row in zip(places, record["attributes"], strict=True):
                expected.append((record["image"], place, row["品类"], row["颜色"], row["图案"]))
    pairs = open_catalogue("pairs", pictures=40)
    assert pairs.columns == ("image", "place", "category", "colour", "pattern")
    assert [tuple(r[name] for name in pairs.columns) for r in iterate(pairs)] == expected
    assert len(expected) >= 2 * 4


def test_relations_are_the_questions_about_the_relation() -> None:
    asked = [r for r in iterate(open_catalogue("questions", pictures=40)) if r["kind"] == "relation"]
    assert list(iterate(open_catalogue("relations", pictures=40))) == asked
    assert len(asked) >= 8


def test_unknown_view_and_split_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r'Did you mean "questions"\?'):
        open_catalogue("question")
    with pytest.raises(UsageError, match="train, validation, test"):
        open_catalogue(split="dev")
