"""Scenes: boxes lie about their goods, statements are true or not as they say, splits hold out combinations."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from openm6.data.source import open_source
from openm6.worlds.catalogue import attributes_in
from openm6.worlds.draw import COLOURS
from openm6.worlds.pictured import HELD_OUT
from openm6.worlds.scenes import PICTURES, picture


def test_records_depend_on_seed_split_and_number_alone() -> None:
    few, more = (list(open_source(f"scenes/train?pictures={n}")) for n in (4, 8))
    assert few == more[:4]
    assert few != list(open_source("scenes/train?pictures=4&seed=1"))
    assert set(PICTURES) == {"train", "validation", "test"}


def test_a_box_holds_the_colour_that_the_phrase_names() -> None:
    checked = 0
    for index in range(300):
        record = picture(0, "train", index)
        named = re.search("([红橙黄绿蓝紫粉黑])色", record["phrase"])
        left, top, right, bottom = record["box"]
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and (right - left) * (bottom - top) < 0.3
        if named is None or "纯色" not in record["phrase"]:
            continue
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"), float)
        near = (np.abs(pixels - COLOURS[named[1]]).max(2) < 70).astype(float)
        inside = near[round(top * 64) : round(bottom * 64), round(left * 64) : round(right * 64)]
        assert inside.mean() > 0.25
        edge = [near[round(top * 64) : round(bottom * 64), x].sum() for x in (round(left * 64), round(right * 64) - 1)]
        checked += min(edge) > 0
    assert checked > 10


def test_statements_and_captions_are_what_they_say() -> None:
    counts = {"蕴含": 0, "矛盾": 0, "无关": 0, "是": 0, "否": 0}
    for index in range(400):
        record = picture(0, "train", index)
        counts[record["relation"]] += 1
        counts[record["match"]] += 1
        told = attributes_in(record["caption"])
        assert len(told) == record["objects"]
        if record["match"] == "是" and record["relation"] != "无关":
            said = attributes_in(record["statement"])[0]
            shown = any(all(item.get(k) == v for k, v in said.items()) for item in told)
            assert shown == (record["relation"] == "蕴含")
    assert min(counts.values()) > 90


def test_a_phrase_points_at_one_of_the_goods_alone() -> None:
    for index in range(300):
        record = picture(0, "train", index)
        if record["match"] == "否" or re.search("[左右][上下]", record["phrase"]):
            continue
        said = attributes_in(record["phrase"])[0]
        fitting = [i for i in attributes_in(record["caption"]) if all(i.get(k) == v for k, v in said.items())]
        assert len(fitting) == 1


def test_scenes_of_the_test_split_show_held_out_combinations_alone() -> None:
    held_out = {(i.category, i.colour, i.pattern) for i in HELD_OUT}
    for split in ("train", "test"):
        for index in range(60):
            for item in attributes_in(picture(0, split, index)["caption"]):
                inside = (item["category"], item["colour"], item["pattern"]) in held_out
                assert inside == (split == "test")
