"""Pictures of 1024 x 1024 pixels through all of it: codec, training with block-sparse attention, drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from openm6.cli import commands

SOURCE = "logos/train?side=1024&pictures=3"


def call(*arguments: str) -> str:
    result = CliRunner().invoke(commands(), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_a_picture_of_4096_codes_is_learned_drawn_and_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENM6_CACHE", str(tmp_path / "cache"))
    codec, run = tmp_path / "codec", tmp_path / "run"
    call(
        "train", "codec_1024", f"output={codec}", "codec.sizes.widths=[8, 8, 8]", "codec.sizes.depth=1",
        "codec.sizes.critic_loss=0", f"data=[{{source: '{SOURCE}'}}]", "evaluation.data=[]", "train.steps=2",
        "train.batch_size=1", "train.workers=0",
    )  # fmt: skip
    call(
        "train", "draw_1024", f"output={run}", f"model.codec={codec / 'model'}", "model.sizes.num_hidden_layers=1",
        "model.sizes.hidden_size=64", "model.sizes.intermediate_size=96", "model.sizes.num_attention_heads=2",
        f"data=[{{source: '{SOURCE}', task: text_to_image}}]", "train.steps=3", "train.batch_size=3",
    )  # fmt: skip
    drawn = tmp_path / "drawn"
    few = ("-n", "1", "-o", "passes=2")
    call("images", "draw", str(run / "model"), "caption=明岭的标志。", *few, "--output", str(drawn))
    picture = np.asarray(Image.open(drawn / "1.png"))
    assert picture.shape == (1024, 1024, 3)
    mask = np.zeros((1024, 1024), np.uint8)
    mask[512:, 512:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    call(
        "images", "edit", str(run / "model"), "caption=明岭的标志。", "--picture", str(drawn / "1.png"), "--mask",
        str(tmp_path / "mask.png"), *few, "--output", str(tmp_path / "edited"),
    )  # fmt: skip
    edited = np.asarray(Image.open(tmp_path / "edited" / "1.png"))
    assert np.array_equal(edited[mask == 0], picture[mask == 0])
    assert not np.array_equal(edited, picture)
