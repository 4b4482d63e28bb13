"""Studio pictures: the same each time, the catalogue's held-out combinations, and controls that fit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from openm6.core.images import sketch
from openm6.data.store import iterate
from openm6.worlds.catalogue import attributes_in, open_catalogue
from openm6.worlds.pictured import HELD_OUT


def test_records_depend_on_seed_and_number_alone() -> None:
    few, more = (list(iterate(open_catalogue("studio", pictures=n))) for n in (20, 40))
    assert [r["image"] for r in few] == [r["image"] for r in more[:20]]
    assert [r["caption"] for r in few] == [r["caption"] for r in more[:20]]
    other = list(iterate(open_catalogue("studio", seed=1, pictures=20)))
    assert not {r["image"] for r in few} & {r["image"] for r in other}


def test_no_training_picture_shows_a_held_out_combination() -> None:
    held_out = {(i.category, i.colour + "色", i.pattern) for i in HELD_OUT}
    for split in ("train", "validation", "test"):
        records = list(iterate(open_catalogue("studio", split, pictures=60)))
        inside = [(r["category"], r["colour"], r["pattern"]) in held_out for r in records]
        assert all(inside) if split == "test" else not any(inside)


@pytest.mark.slow
def test_controls_fit_their_picture() -> None:
    records = list(iterate(open_catalogue("studio", pictures=1200)))
    by_image = {r["image"]: r for r in records}
    apart = 0
    for record in records:
        like, style = by_image[record["reference"]], by_image[record["style"]]
        names = ("category", "colour", "pattern")
        assert all(like[n] == record[n] for n in names)
        assert all(style[n] == record[n] for n in names[1:])
        apart += like is not record and style["category"] != record["category"]
        assert len(record["caption"]) == 6
    assert apart > 1000  # hardly any stands for itself
    lines = Image.open(io.BytesIO(records[0]["sketch"])).convert("L")
    assert np.array_equal(np.asarray(lines), np.asarray(sketch(records[0]["image"], 64)))


@pytest.mark.slow
def test_a_wrong_caption_is_wrong_in_one_attribute_and_of_its_split() -> None:
    held_out = {(i.category, i.colour + "色", i.pattern) for i in HELD_OUT}
    for split in ("train", "test"):
        studio = open_catalogue("studio", split, pictures=300)
        wrong = {"category": 0, "colour": 0, "pattern": 0}
        right = 0
        for number, record in enumerate(iterate(open_catalogue("matches", split, pictures=300))):
            shown = studio[number]
            assert record["image"] == shown["image"]
            if record["verdict_relevance"]:
                right += 1
                assert record["caption"] == shown["caption"]
                continue
            told = attributes_in(record["caption"][0])[0]
            told["colour"] += "色"
            assert ((told["category"], told["colour"], told["pattern"]) in held_out) == (split == "test")
            off = [name for name in wrong if told[name] != shown[name]]
            near = (sum(o[k] != shown[name] for k, name in enumerate(wrong)) == 1 for o in held_out)
            alone = split == "test" and not any(near)  # no other held-out item differs in one attribute
            assert len(off) == 1 or (alone and off)
            wrong[off[0]] += 1
        assert 110 < right < 190
        assert min(wrong.values()) > 25 or split == "test"


def test_studio_pictures_have_less_noise_and_larger_items() -> None:
    def noise(view: str) -> float:
        corners = [
            np.asarray(Image.open(io.BytesIO(r["image"])), float)[:6, :6]
            for r in iterate(open_catalogue(view, pictures=60))
        ]
        return float(np.median([c.std((0, 1)).mean() for c in corners]))

    assert noise("studio") < 0.7 * noise("items")
