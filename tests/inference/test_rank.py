"""What a model draws: each picture by a seed of its own that draws it again alone, and says so in its file."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6._version import __version__
from openm6.core.bases import directory_hash
from openm6.core.errors import DataError
from openm6.core.images import open_image, png
from openm6.inference import rank as candidate
from openm6.inference.session import Session
from tests.conftest import drawing_session
from tests.tasks.conftest import picture

TASK, CAPTION = "text_to_image", "红色的杯子"
QUICK = {"passes": 2, "guidance": 0, "temperature": 1.0}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    place = tmp_path_factory.mktemp("a private folder") / "model"
    drawing_session().save(place)
    return Session.load(place)


def origin(file: bytes) -> dict[str, Any]:
    """What a PNG file says of itself."""
    with Image.open(io.BytesIO(file)) as image:
        return dict(json.loads(image.text["openm6"]))  # type: ignore[attr-defined]


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_without_a_seed_every_drawing_is_another_one(session: Session) -> None:
    found = [session.draw(TASK, decoding=QUICK, caption=CAPTION)[0] for _ in range(8)]
    assert len({one.seed for one in found}) == 8 and len({one.codes.tobytes() for one in found}) > 1
    assert not same(*(session.run(TASK, decoding={**QUICK, "temperature": 9}, caption=CAPTION) for _ in range(2)))


@pytest.mark.parametrize("options", [QUICK, {"passes": 0}, {**QUICK, "guidance": 2.0}, {**QUICK, "branches": 2}])
def test_each_candidate_is_drawn_again_alone_by_its_seed(session: Session, options: dict[str, Any]) -> None:
    drawn = session.draw(TASK, candidates=4, decoding={**options, "seed": 7}, caption=CAPTION)
    assert {one.seed - one.number for one in drawn} == {7}
    for one in drawn:
        [alone] = session.draw(TASK, decoding={**options, "seed": one.seed}, caption=CAPTION)
        assert same(one.image, alone.image) and alone.seed == one.seed
    records = [{"caption": CAPTION}, {"caption": "杯子"}]
    many = list(session.draw_many(TASK, records, candidates=2, decoding={**options, "seed": 7}))
    assert sorted(one.seed for some in many for one in some) == [7, 8, 9, 10]
    [alone] = session.draw(TASK, decoding={**options, "seed": many[1][0].seed}, caption="杯子")
    assert same(many[1][0].image, alone.image)


def test_a_png_says_all_that_draws_it_again(session: Session, tmp_path: Path) -> None:
    sketch = tmp_path / "sketch.png"
    sketch.write_bytes(picture(16, 16))
    asked = {"caption": CAPTION, "sketch": str(sketch)}
    drawn = session.draw("controlled_image", candidates=3, decoding=QUICK, **asked)
    for one in drawn:
        told = origin(png(one.image))
        assert told["openm6"] == __version__ and told["model"] == directory_hash(Path(str(session.path)))
        assert told["task"] == "controlled_image" and told["number"] == one.number and told["kept"] == 0
        assert told["slots"] == {"caption": CAPTION, "sketch": {"sha256": hashlib.sha256(picture(16, 16)).hexdigest()}}
        assert told["options"]["seed"] == one.seed and told["options"]["passes"] == 2
        assert str(tmp_path) not in json.dumps(told) and "private" not in json.dumps(told)
        [again] = session.draw("controlled_image", decoding=told["options"], **asked)
        assert same(again.image, Image.open(io.BytesIO(png(one.image))))
    kept = np.where(np.arange(16) < 5, drawn[0].codes, -1)
    assert origin(png(session.draw(TASK, kept=kept, caption=CAPTION)[0].image))["kept"] == 5


def test_a_picture_of_a_drawn_picture_does_not_say_that_it_was_drawn(session: Session) -> None:
    [drawn] = session.draw(TASK, decoding=QUICK, caption=CAPTION)
    for given in (drawn.image, png(drawn.image)):
        assert "openm6" not in open_image(given).info
    assert "openm6" in drawn.image.info


@pytest.mark.parametrize("slots", [{"caption": "  "}, {"caption": "\u3000\n"}, {}])
def test_a_wish_of_nothing_is_refused(session: Session, slots: dict[str, Any]) -> None:
    said = "caption: holds blanks alone" if slots else "nothing is asked for: give caption"
    with pytest.raises(DataError, match=said):
        session.draw(TASK, **slots)
    with pytest.raises(DataError, match=said):
        session.run(TASK, **slots)
    found = list(session.run_many(TASK, [slots, {"caption": CAPTION}], on_error="return", decoding=QUICK))
    assert isinstance(found[0], DataError) and isinstance(found[1], Image.Image)
    assert session.draw(TASK, kept=np.full(16, -1), decoding=QUICK)  # a picture that goes on as it likes


def test_a_candidate_that_does_not_read_as_what_was_asked_for_is_uncertain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the mean over the tokens, so that a longer wish is not less certain; where the model can read."""
    session = drawing_session()
    asked: dict[str, Any] = {"candidates": 6, "decoding": {**QUICK, "seed": 1}, "caption": CAPTION}
    assert not any("reading" in one.estimates or one.uncertain for one in session.draw(TASK, **asked))
    session.tasks["caption"] = session.task("caption")  # it can read
    drawn = session.draw(TASK, **asked)
    losses, counts = session.target_losses("caption", [{"photo": one.image, "caption": CAPTION} for one in drawn])
    means = (-losses / counts).tolist()
    assert [one.estimates["reading"] for one in drawn] == pytest.approx((-losses).tolist())
    caplog.clear()
    middle = sorted(means)[3]
    monkeypatch.setattr(candidate, "UNREAD", middle - 1e-6)
    found = session.draw(TASK, **asked)
    assert [one.uncertain for one in found] == [mean < middle - 1e-6 for mean in means]
    assert {one.uncertain for one in found} == {True, False}
    for limit, warned in ((max(means) + 1, 1), (min(means) - 1, 0)):
        monkeypatch.setattr(candidate, "UNREAD", limit)
        fresh = Session(session.model, session.processor, session.tasks.values())
        caplog.clear()
        for _ in range(2):
            fresh.run(TASK, caption=CAPTION, decoding=QUICK)
        assert sum("does not find in the best picture" in one.getMessage() for one in caplog.records) == warned
    # Without the reading nothing is known.
    assert not any(one.uncertain for one in session.draw(TASK, **{**asked, "decoding": {**QUICK, "reading": 0}}))
