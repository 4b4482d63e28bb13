"""Training an image codec: by the loop that trains M6, from a recipe, resumed, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from openm6.core.errors import DataError, UsageError
from openm6.inference.session import Session
from openm6.model.codec import Codec
from openm6.model.files import load_network
from openm6.train.codec import read_picture, structural_similarity
from openm6.train.recipe import AnyRecipe, check_recipe, load_recipe
from openm6.train.trainer import train
from tests.train.conftest import SIZES, PowerCutError, cut_at, logged, losses, tiny_recipe


def recipe(output: Path, **changes: Any) -> Any:
    sizes = {"image_size": 16, "widths": [8, 16], "patch": 2, "levels": [4, 4], "depth": 1, **changes.pop("sizes", {})}
    return check_recipe(
        {
            "name": "tiny codec",
            "output": output,
            "codec": {"sizes": sizes},
            "data": [{"source": "demo:items/train?pictures=40", "name": "goods"}],
            "train": {
                "steps": 6, "batch_size": 8, "warmup": 1, "workers": 0, "log_every": 1, "checkpoint_every": 3,
                "precision": "fp32", **changes.pop("train", {}),
            },
            "evaluation": {
                "every": 3, "limit": 8, "data": [{"source": "demo:items/test?pictures=10", "name": "new goods"}],
            },
            **changes,
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"quantizer": "vq", "num_codes": 32}, {"critic_loss": 0.1}])
def test_pictures_come_back_better(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = train(recipe(tmp_path, sizes=sizes, train={"steps": 60, "learning_rate": 5e-3, "checkpoint_every": 60}))
    found = losses(tmp_path)
    assert found[60] < 0.6 * found[1]
    measured = [line for line in logged(tmp_path) if "psnr" in line]
    assert measured[-1]["psnr"] > measured[0]["psnr"]
    assert 0 < measured[-1]["codes_used"] <= 1
    assert -1 <= measured[-1]["ssim"] <= 1
    grid = np.asarray(Image.open(tmp_path / "reconstructions" / "new-goods.png"))
    assert grid.shape == (32, 8 * 16, 3)
    codec = load_network(Codec, model).eval()
    picture = torch.from_numpy(grid[:16, :16].copy())[None]  # the grid shows what the saved codec makes
    made = codec.decode(codec.encode(picture))[0].numpy()
    assert np.abs(made.astype(int) - grid[16:, :16].astype(int)).mean() < 2


def test_psnr_is_that_of_its_definition(tmp_path: Path) -> None:
    train(recipe(tmp_path, train={"steps": 3}))
    grid = np.asarray(Image.open(tmp_path / "reconstructions" / "new-goods.png")).astype(float)
    errors = [np.mean((grid[:16, x : x + 16] - grid[16:, x : x + 16]) ** 2) for x in range(0, 128, 16)]
    wanted = np.mean([10 * np.log10(255**2 / e) for e in errors])
    assert logged(tmp_path)[-2]["psnr"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_codec_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    train(recipe(tmp_path / "whole", sizes={"quantizer": "vq", "num_codes": 32}))
    again = recipe(tmp_path / "cut", sizes={"quantizer": "vq", "num_codes": 32})
    with pytest.raises(PowerCutError):
        train(again, cut_at(5))
    train(again)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_codec_can_be_trained_on(tmp_path: Path) -> None:
    first = train(recipe(tmp_path / "first", train={"steps": 20}))
    values = recipe(tmp_path / "second").model_dump(mode="json", exclude_unset=True)
    train(check_recipe({**values, "codec": {"path": str(first)}}))
    assert losses(tmp_path / "second")[1] == pytest.approx(losses(tmp_path / "first")[20], rel=0.2)


def with_perceptual_model(values: dict[str, Any], model: Path, output: Path) -> AnyRecipe:
    return check_recipe({**values, "codec": {**values["codec"], "perceptual_model": str(model)}, "output": output})


@pytest.mark.slow
def test_the_features_can_be_those_of_a_model_that_reads(tmp_path: Path) -> None:
    """The perceptual layers are not trained, are no part of the codec, and their features are in the loss."""
    reader = train(tiny_recipe(tmp_path / "reader", model={"preset": "demo", "sizes": SIZES}, steps=1))
    before = Session.load(reader, trainable=True).model.image.features.state_dict()  # type: ignore[union-attr]
    values = recipe(tmp_path / "own").model_dump(mode="json", exclude_unset=True)
    model = train(with_perceptual_model(values, reader, tmp_path / "perceptual"))
    train(check_recipe(values))
    assert losses(tmp_path / "perceptual")[1] != losses(tmp_path / "own")[1]
    after = Session.load(reader, trainable=True).model.image.features.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        load_network(Codec, model).state_dict().keys()
        == load_network(Codec, tmp_path / "own" / "model").state_dict().keys()
    )
    patches = {"preset": "demo", "sizes": {**SIZES, "image_embedder": "patch"}}
    plain = train(tiny_recipe(tmp_path / "plain", model=patches, steps=1))
    with pytest.raises(UsageError, match=r"codec.perceptual_model: .* has no stem; its image_embedder has to be stem"):
        train(with_perceptual_model(values, plain, tmp_path / "x"))


def test_a_picture_of_any_shape_is_cut_to_a_square() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (read_picture({"image": wide}, 8).pixels > 200).mean() > 0.8
    with pytest.raises(DataError, match="no picture in this record"):
        read_picture({"image": None}, 8)


def test_shipped_recipes_can_be_read() -> None:
    for name, side in (("codec_64", 8), ("codec_256", 16), ("codec_1024", 64)):
        found: Any = load_recipe(name)
        from openm6.model.codec import CodecConfig

        assert CodecConfig(**found.codec.sizes).side == side


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": {"size": 3}}, "unknown key codec.size"),
        ({"codec": {"sizes": {}, "path": "x"}, "model": {"preset": "demo"}}, "unknown key model"),
        ({"codec": {"sizes": {"image_size": 60}}}, "image_size is 60"),
        ({"data": [{"source": "demo:items/train", "task": "caption"}]}, "unknown key data.0.task"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = recipe(tmp_path).model_dump(mode="json", exclude_unset=True)
    with pytest.raises(UsageError, match=message):
        train(check_recipe({**values, **change}))


def test_data_without_pictures_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"words": "红色"}) + "\n", "utf-8")
    with pytest.raises(UsageError, match="The task codec needs image"):
        train(recipe(tmp_path / "run", data=[{"source": str(data)}]))


def test_similarity_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (3, 3, 24, 32), generator=generator).float()
    second = (first + 20 * torch.randn(first.shape, generator=generator)).clamp(0, 255)
    expected = structural_similarity_index_measure(second, first, data_range=255.0, reduction="none")
    assert torch.allclose(structural_similarity(second, first), expected, atol=1e-4)
    assert torch.allclose(structural_similarity(first, first), torch.ones(3), atol=1e-5)
