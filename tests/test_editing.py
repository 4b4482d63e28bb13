"""Pictures changed in part: what is kept comes back bit by bit, and what is asked for in vain is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from openm6.bundle import Bundle
from openm6.editing import blend, edit, extend, pixels_of, vary
from openm6.errors import DataError, UsageError
from openm6.tasks.processor import Processor
from tests.conftest import drawing_bundle

TASK = "text_to_image"
QUICK = {"passes": 2, "guidance": 0}


BUNDLE = drawing_bundle()


def noise(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


masks = st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True)


def test_what_follows_the_only_control_is_what_is_relevant() -> None:
    drawn = BUNDLE.draw("text_to_image", candidates=3, decoding=QUICK, caption="红色的杯子")
    found = BUNDLE.relevance_by_slot("text_to_image", drawn, caption="红色的杯子")
    assert found.keys() == {"caption"}
    assert found["caption"] == pytest.approx([painting.estimates["relevance"] for painting in drawn], abs=1e-4)
    picture = np.zeros((16, 16, 3), np.uint8)
    two = BUNDLE.relevance_by_slot("controlled_image", drawn, caption="红色的杯子", style=picture)
    assert two.keys() == {"caption", "style"} and two["caption"] != pytest.approx(two["style"])


@given(masks, st.integers(0, 3))
@settings(max_examples=25)
def test_pixels_outside_of_the_touched_blocks_come_back_bit_by_bit(places: list[int], seed: int) -> None:
    mask = np.zeros(256, bool)
    mask[places] = True
    mask = mask.reshape(16, 16)
    picture = noise(seed=seed)
    best = edit(BUNDLE, TASK, picture, mask, decoding={**QUICK, "seed": seed}, caption="红色的杯子")[0]
    inside = pixels_of(BUNDLE.codec.blocks_of(mask), 4)
    assert inside[mask].all()
    changed = np.asarray(best.image)
    assert np.array_equal(changed[~inside], picture[~inside])
    assert not np.array_equal(changed[inside], picture[inside])


def test_candidates_of_an_edit_come_best_first_and_keep_the_codes() -> None:
    picture, mask = noise(), np.eye(16, dtype=np.uint8) * 255
    found = edit(BUNDLE, TASK, picture, mask, candidates=3, decoding=QUICK, caption="红色的杯子")
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert sorted(p.number for p in found) == [0, 1, 2]
    given_codes = BUNDLE.codec.encode(picture).reshape(4, 4)
    for painting in found:
        kept = ~np.eye(4, dtype=bool)
        assert np.array_equal(painting.codes.reshape(4, 4)[kept], given_codes[kept])


def test_the_seam_has_the_given_pictures_tone() -> None:
    """A drawing that is brighter all over: the step at the seam goes, half a block inside it is as drawn."""
    given_picture, drawn = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 140, np.uint8)
    open_blocks = np.zeros((2, 2), bool)
    open_blocks[:, 1] = True
    found = blend(given_picture, drawn, open_blocks)
    assert (found[:, :8] == 100).all()
    row = found[5, 8:, 0].astype(int)
    assert row[0] < 120 and (np.diff(row) >= 0).all() and (row[4:] == 140).all()
    assert np.array_equal(blend(given_picture, drawn, np.ones((2, 2), bool)), drawn)
    with pytest.raises(DataError, match="cannot be blended"):
        blend(given_picture[:8], drawn, open_blocks)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="The mask has 8 x 16 pixels and the picture 16 x 16"):
        edit(BUNDLE, TASK, noise(), np.ones((16, 8), bool), caption="杯子")
    with pytest.raises(UsageError, match="black everywhere"):
        edit(BUNDLE, TASK, noise(), np.zeros((16, 16), bool), caption="杯子")
    with pytest.raises(DataError, match="in no picture format"):
        edit(BUNDLE, TASK, b"no picture", np.ones((16, 16), bool), caption="杯子")


def test_a_variation_keeps_the_rest_of_the_codes() -> None:
    picture = noise()
    codes = BUNDLE.codec.encode(picture)
    varied = vary(BUNDLE, TASK, picture, share=0.25, candidates=2, decoding=QUICK, caption="杯子")
    assert all((painting.codes == codes).sum() >= 12 for painting in varied)
    with pytest.raises(UsageError, match=r"share is 1.5; it is above 0, and at most 1\."):
        vary(BUNDLE, TASK, picture, share=1.5, caption="杯子")


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
@pytest.mark.parametrize("pixels", [4, 7, 21])
def test_a_continued_picture_begins_with_the_given_one(side: str, pixels: int) -> None:
    picture = noise()
    found = np.asarray(extend(BUNDLE, TASK, picture, side, pixels, decoding=QUICK, caption="杯子"))
    wide = side in ("left", "right")
    assert found.shape == ((16, 16 + pixels, 3) if wide else (16 + pixels, 16, 3))
    own = {
        "right": found[:, :16], "left": found[:, -16:], "bottom": found[:16], "top": found[-16:],
    }[side]  # fmt: skip
    assert np.array_equal(own, picture)


def test_what_cannot_be_continued_is_refused() -> None:
    with pytest.raises(UsageError, match="side is up; it can be left, right, top, bottom"):
        extend(BUNDLE, TASK, noise(), "up", 4)
    with pytest.raises(UsageError, match="pixels is 0"):
        extend(BUNDLE, TASK, noise(), "left", 0)
    plain = Bundle(BUNDLE.model, Processor(BUNDLE.processor.tokenizer, BUNDLE.processor.grid, 64))
    with pytest.raises(UsageError, match="does not draw"):
        extend(plain, TASK, Image.fromarray(noise()), "left", 4)


def test_a_picture_does_not_come_in_pieces() -> None:
    with pytest.raises(UsageError, match="draws a picture, which does not come in pieces"):
        next(BUNDLE.stream(TASK, caption="杯子"))
