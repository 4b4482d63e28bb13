"""Families of logos, and pets: the same each time, alike inside, unlike each other."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.worlds.draw import COLOURS
from openm6.worlds.subjects import family, pet


def test_a_family_is_its_seed() -> None:
    few, more = (open_source(f"logos/train?seed=3&pictures={count}") for count in (3, 6))
    assert len(open_source("logos/train")) == 20
    assert [few[i]["image"] for i in range(3)] == [more[i]["image"] for i in range(3)]
    assert {record["name"] for record in more} == {family(3).name}
    assert all(family(3).name in text for text in few[0]["caption"])
    assert len({family(seed).name for seed in range(30)}) > 20
    test = open_source("logos/test?seed=3&pictures=6")
    assert not {r["image"] for r in more} & {r["image"] for r in test}


def test_pictures_show_both_colours_before_another_ground() -> None:
    for seed in range(6):
        for record in open_source(f"logos/train?seed={seed}&pictures=5"):
            picture = Image.open(io.BytesIO(record["image"]))
            assert picture.size == (64, 64)
            pixels = np.asarray(picture, np.float32)
            for name in family(seed).colours:
                # By direction, as exposure scales them; black by its darkness.
                colour = np.array(COLOURS[name], np.float32)
                near = np.abs(pixels - colour).max(2) < 60
                assert near.mean() > 0.01, (seed, name)
            assert np.abs(pixels[:3, :3] - np.array(COLOURS[family(seed).colours[0]])).max() > 30


def test_a_large_picture_shows_the_same() -> None:
    small, large = (open_source(f"logos/train?seed=1&pictures=3&side={side}") for side in (64, 512))
    for one, other in zip(small, large, strict=True):
        ours = np.asarray(Image.open(io.BytesIO(one["image"])), np.float32)
        picture = Image.open(io.BytesIO(other["image"]))
        assert picture.size == (512, 512)
        assert np.abs(ours - np.asarray(picture.reduce(8), np.float32)).mean() < 8
    with pytest.raises(UsageError, match="16 to 2,048 pixels"):
        open_source("logos/train?side=4096")


def test_an_unknown_split_is_told() -> None:
    with pytest.raises(UsageError, match="no split 'trial'"):
        open_source("logos/trial")
    with pytest.raises(UsageError, match="unknown option colour"):
        open_source("logos/train?colour=1")


def test_a_pet_is_its_seed() -> None:
    few, more = (open_source(f"pets/train?seed=3&pictures={count}") for count in (3, 6))
    assert len(open_source("pets/train")) == 20
    assert [few[i]["image"] for i in range(3)] == [more[i]["image"] for i in range(3)]
    name = pet(3)[0]
    assert {record["name"] for record in more} == {name}
    assert all(name in text for text in few[0]["caption"])
    test = open_source("pets/test?seed=3&pictures=6")
    assert not {r["image"] for r in more} & {r["image"] for r in test}


def test_thirty_two_pets_differ_in_name_and_looks() -> None:
    names, looks = zip(*(pet(seed) for seed in range(32)), strict=True)
    assert len(set(names)) == len(set(looks)) == 32
    assert {look.category for look in looks[:4]} == {look.category for look in looks}


def test_pictures_show_the_coat() -> None:
    for seed in range(6):
        colour = np.array(COLOURS[pet(seed)[1].colour], np.float32)
        for record in open_source(f"pets/train?seed={seed}&pictures=5"):
            picture = Image.open(io.BytesIO(record["image"]))
            assert picture.size == (64, 64)
            near = np.abs(np.asarray(picture, np.float32) - colour).max(2) < 60
            assert near.mean() > 0.02, seed


def test_an_unknown_split_of_pets_is_told() -> None:
    with pytest.raises(UsageError, match="no split 'trial'"):
        open_source("pets/trial")
