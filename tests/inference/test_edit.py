"""Pictures changed in part: what is kept comes back bit by bit, and what is asked for in vain is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import ExifTags, Image

from openm6.core.errors import DataError, UsageError
from openm6.core.images import png, seed_of_drawn
from openm6.inference.edit import COVERS_ALL, blend, cut_of, edit, extend, marked_by, vary
from openm6.inference.session import Session
from openm6.tasks.processor import Processor
from tests.conftest import drawing_session

TASK = "text_to_image"
QUICK = {"passes": 2, "guidance": 0}


BUNDLE = drawing_session()


def noise(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


masks = st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True)


def test_what_follows_the_only_control_is_what_is_relevant() -> None:
    drawn = BUNDLE.draw("text_to_image", candidates=3, decoding=QUICK, caption="红色的杯子")
    found = BUNDLE.relevance_by_slot("text_to_image", drawn, caption="红色的杯子")
    assert found.keys() == {"caption"}
    assert found["caption"] == pytest.approx([candidate.estimates["relevance"] for candidate in drawn], abs=1e-4)
    picture = np.zeros((16, 16, 3), np.uint8)
    two = BUNDLE.relevance_by_slot("controlled_image", drawn, caption="红色的杯子", style=picture)
    assert two.keys() == {"caption", "style"} and two["caption"] != pytest.approx(two["style"])


@given(masks, st.integers(0, 3))
@settings(max_examples=25)
def test_pixels_outside_of_the_mask_come_back_bit_by_bit(places: list[int], seed: int) -> None:
    mask = np.zeros(256, bool)
    mask[places] = True
    mask = mask.reshape(16, 16)
    picture = noise(seed=seed)
    best = edit(BUNDLE, TASK, picture, mask, decoding={**QUICK, "seed": seed}, caption="红色的杯子")[0]
    changed = np.asarray(best.image)
    assert np.array_equal(changed[~mask], picture[~mask])
    assert not np.array_equal(changed[mask], picture[mask])


def photo(mode: str, width: int = 64, height: int = 48) -> Image.Image:
    """Noise in every channel, the alpha channel too."""
    values = np.random.default_rng(7).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values[..., :2]) if mode == "LA" else Image.fromarray(values).convert(mode)


PLACES = {"middle": (30, 20, 40, 26), "corner": (54, 0, 64, 8), "wide": (2, 20, 62, 24), "all": (0, 0, 64, 48)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_an_edited_photo_has_its_size_its_mode_and_its_pixels_outside_of_the_mask(mode: str, place: str) -> None:
    given_photo, (left, top, right, bottom) = photo(mode), PLACES[place]
    mask = np.zeros((48, 64), bool)
    mask[top:bottom, left:right] = True
    for candidate in edit(BUNDLE, TASK, given_photo, mask, candidates=2, decoding=QUICK, caption="红色的杯子"):
        found, before = np.asarray(candidate.image), np.asarray(given_photo)
        assert (candidate.image.mode, candidate.image.size) == (mode, (64, 48))
        assert np.array_equal(found[~mask], before[~mask])
        if mode.endswith("A"):
            assert np.array_equal(found[..., -1], before[..., -1])
        assert not np.array_equal(found[mask], before[mask])


def test_what_the_model_sees_is_the_square_around_the_mask() -> None:
    """A photo of one colour for each pixel's place: the colours of the square tell where it was cut."""
    rows, columns = np.mgrid[:48, :64].astype(np.uint8)
    places = np.stack((columns, rows, rows), 2)
    for box, (left, top, width) in {
        (30, 20, 40, 26): (27, 15, 16),  # a square of the codec's size in its middle
        (0, 40, 20, 48): (0, 18, 30),  # a fourth of the mask's longer side around it, within the photo
        (2, 20, 62, 24): (2, -6, 60),  # more than the photo is high
    }.items():
        mask = np.zeros((48, 64), bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        cut = cut_of(16, 4, places, mask)
        assert (*cut.corner, cut.weights.width) == (left, top, width)
        assert np.allclose(cut.pixels[8, 8, :2], (left + width / 2, top + width / 2), atol=width / 16)
        # The blocks that the mask touches, and no other, are drawn.
        edges = left + np.arange(5) * width / 4, top + np.arange(5) * width / 4
        touched = [
            np.array([e[i] < box[2 + k] and e[i + 1] > max(box[k], 0) for i in range(4)]) for k, e in enumerate(edges)
        ]
        if top >= 0:
            assert np.array_equal(cut.open_blocks, touched[1][:, None] & touched[0][None])


def test_the_edge_fades_inside_of_the_mask_alone() -> None:
    white, mask = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), bool)
    mask[8:56, 8:56] = True
    weights = np.asarray(cut_of(16, 4, white, mask).weights)
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    assert weights[32, 8] < 64 and (np.diff(weights[32, 8:20].astype(int)) >= 0).all() and weights[32, 32] == 255
    to_the_border = mask.copy()
    to_the_border[:, :32] = True
    assert np.asarray(cut_of(16, 4, white, to_the_border).weights)[32, 0] == 255  # no edge is seen there


def saved(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_a_mask_marks_what_is_transparent_or_without_an_alpha_channel_what_is_white() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    values[0, :3] = 127, 128, 255
    wanted = values >= 128
    assert not wanted[0, 0] and wanted[0, 1]
    grey = np.repeat(values[..., None], 3, 2)
    clear = np.dstack((rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 255 - values))
    for mask in (saved(values), saved(grey), saved(clear), saved(clear[..., 2:]), values, grey, clear, values >= 128):
        assert np.array_equal(marked_by(mask), wanted)


def test_the_own_transparency_of_a_picture_is_a_mask_that_is_filled() -> None:
    pixels = np.dstack((noise(48, 64), np.full((48, 64), 255, np.uint8)))
    pixels[10:30, 10:30, 3] = 0
    found = np.asarray(edit(BUNDLE, TASK, pixels, decoding=QUICK, caption="红色的杯子")[0].image)
    hole = pixels[..., 3] == 0
    assert (found[hole][:, 3] == 255).all() and np.array_equal(found[~hole], pixels[~hole])
    assert not np.array_equal(found[hole][:, :3], pixels[hole][:, :3])


def test_a_photo_is_edited_upright_and_keeps_its_colour_profile(tmp_path: Path) -> None:
    """A photo that lies on its side, as a phone writes it: the mask is as people see it."""
    lying = Image.fromarray(noise(48, 64))
    exif = lying.getexif()
    exif[ExifTags.Base.Orientation] = 6
    lying.save(tmp_path / "photo.png", exif=exif, icc_profile=b"a profile")
    upright = np.rot90(np.asarray(lying), -1)
    mask = np.zeros((64, 48), bool)
    mask[:20, :10] = True
    found = edit(BUNDLE, TASK, tmp_path / "photo.png", mask, decoding=QUICK, caption="红色的杯子")[0].image
    assert found.size == (48, 64) and np.array_equal(np.asarray(found)[~mask], upright[~mask])
    again = Image.open(io.BytesIO(png(found)))
    assert again.info["icc_profile"] == b"a profile" and not again.getexif().get(ExifTags.Base.Orientation)


def test_a_mask_that_covers_the_whole_picture_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clear = np.dstack((noise(), np.zeros((16, 16), np.uint8)))
    clear[4:8, 4:8, 3] = 255
    mask = np.zeros((16, 16), bool)
    mask[2:9, 2:9] = True  # all that is seen
    for picture, covering in ((noise(), np.ones((16, 16), bool)), (clear, mask)):
        caplog.clear()
        edit(BUNDLE, TASK, picture, covering, decoding=QUICK, caption="红色的杯子")
        assert [told.message for told in caplog.records if told.name == "openm6.inference.edit"] == [COVERS_ALL]
    caplog.clear()
    edit(BUNDLE, TASK, noise(), mask, decoding=QUICK, caption="红色的杯子")
    assert not [told for told in caplog.records if told.name == "openm6.inference.edit"]


def test_candidates_of_an_edit_come_best_first_and_keep_the_codes() -> None:
    picture, mask = noise(), np.eye(16, dtype=np.uint8) * 255
    found = edit(BUNDLE, TASK, picture, mask, candidates=3, decoding=QUICK, caption="红色的杯子")
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert sorted(p.number for p in found) == [0, 1, 2]
    given_codes = BUNDLE.codec.encode(picture).reshape(4, 4)
    for candidate in found:
        kept = ~np.eye(4, dtype=bool)
        assert np.array_equal(candidate.codes.reshape(4, 4)[kept], given_codes[kept])


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
    opaque = np.dstack((noise(), np.full((16, 16), 255, np.uint8)))
    half = opaque.copy()
    half[:, 8:, 3] = 0
    for picture, mask, said in (
        (noise(), np.ones((16, 8), bool), "The mask has 8 x 16 pixels and the picture 16 x 16"),
        (noise(), np.zeros((16, 16), bool), "The mask marks nothing"),
        (noise(), np.full((16, 16), 127, np.uint8), r"white \(grey value 128 or above\)"),
        (noise(), opaque, r"transparent \(alpha below 128\)"),
        (opaque, None, "The mask marks nothing"),
        (noise(), None, "The picture is transparent nowhere: a mask has to say what is redrawn"),
        (half, half, "only what is transparent in the picture"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            edit(BUNDLE, TASK, picture, mask, caption="杯子")
        assert caught.value.param == "mask"
    with pytest.raises(DataError, match="in no picture format"):
        edit(BUNDLE, TASK, b"no picture", np.ones((16, 16), bool), caption="杯子")


def test_a_variation_keeps_the_rest_of_the_codes() -> None:
    picture = noise()
    codes = BUNDLE.codec.encode(picture)
    varied = vary(BUNDLE, TASK, picture, share=0.25, candidates=2, decoding=QUICK, caption="杯子")
    assert all((candidate.codes == codes).sum() >= 12 for candidate in varied)
    assert {candidate.image.size for candidate in vary(BUNDLE, TASK, photo("RGB"), decoding=QUICK)} == {(16, 16)}
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


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("side", ["left", "bottom"])
def test_a_photo_is_continued_at_its_own_size(side: str, mode: str) -> None:
    given_photo = photo(mode)
    found = extend(BUNDLE, TASK, given_photo, side, 50, decoding=QUICK, caption="杯子")
    values = np.asarray(found)
    assert (found.mode, found.size) == (mode, (114, 48) if side == "left" else (64, 98))
    own, new = (values[:, 50:], values[:, :50]) if side == "left" else (values[:48], values[48:])
    assert np.array_equal(own, np.asarray(given_photo))
    assert len(np.unique(new)) > 8 and (not mode.endswith("A") or (new[..., -1] == 255).all())


def test_a_changed_picture_says_that_more_than_its_values_draw_it_again() -> None:
    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:40] = True
    for changed, again in (
        (edit(BUNDLE, TASK, photo("RGB"), mask, decoding=QUICK, caption="杯子")[0].image,
         lambda options: edit(BUNDLE, TASK, photo("RGB"), mask, decoding=options, caption="杯子")[0].image),
        (extend(BUNDLE, TASK, photo("RGB"), "left", 50, decoding=QUICK, caption="杯子"),
         lambda options: extend(BUNDLE, TASK, photo("RGB"), "left", 50, decoding=options, caption="杯子")),
    ):  # fmt: skip
        told = json.loads(Image.open(io.BytesIO(png(changed))).info["openm6"])
        assert told["edited"] is True and told["slots"] == {"caption": "杯子"}
        assert seed_of_drawn(changed) == told["options"]["seed"]
        assert np.array_equal(np.asarray(again(told["options"])), np.asarray(changed))
    assert "edited" not in json.loads(BUNDLE.draw(TASK, decoding=QUICK, caption="杯子")[0].image.info["openm6"])


def test_what_cannot_be_continued_is_refused() -> None:
    with pytest.raises(UsageError, match="side is up; it can be left, right, top, bottom"):
        extend(BUNDLE, TASK, noise(), "up", 4)
    with pytest.raises(UsageError, match="pixels is 0"):
        extend(BUNDLE, TASK, noise(), "left", 0)
    plain = Session(BUNDLE.model, Processor(BUNDLE.processor.tokenizer, BUNDLE.processor.grid, 64))
    with pytest.raises(UsageError, match="does not draw"):
        extend(plain, TASK, Image.fromarray(noise()), "left", 4)


def test_a_picture_does_not_come_in_pieces() -> None:
    with pytest.raises(UsageError, match="A picture does not come in pieces"):
        next(BUNDLE.stream(TASK, caption="杯子"))
