"""A model that learns to draw: the codec comes with it, and one checkpoint draws and describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openm6.core.errors import UsageError
from openm6.inference.session import Session
from openm6.model.codec import Codec, CodecConfig
from openm6.model.files import load_network, save_network
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from tests.processes import run_openm6
from tests.train.conftest import SIZES, logged, tiny_recipe

COLOURS = {"红色": (200, 30, 40), "绿色": (30, 160, 60), "蓝色": (40, 60, 200), "黄色": (240, 220, 40)}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned four plain pictures by heart, forwards and backwards."""
    folder = tmp_path_factory.mktemp("drawing")
    codec = train(
        check_recipe({
            "name": "codec", "output": str(folder / "codec"),
            "codec": {"sizes": {"image_size": 16, "widths": [8, 16], "patch": 2, "levels": [5, 5, 5], "depth": 1}},
            "data": [{"source": str(written(folder))}],
            "train": {
                "steps": 150, "batch_size": 16, "learning_rate": 5e-3, "warmup": 10, "workers": 0, "precision": "fp32",
                "checkpoint_every": 150, "log_every": 50,
            },
        })
    )  # fmt: skip
    data = [
        {"source": str(written(folder)), "task": "text_to_image", "weight": 3},
        {"source": str(written(folder)), "task": "caption"},
    ]
    model = {
        "preset": "demo", "codec": str(codec),
        "sizes": {**SIZES, "hidden_size": 64, "intermediate_size": 128},
    }  # fmt: skip
    evaluation = {"every": 150, "data": [{"source": str(written(folder)), "task": "text_to_image"}]}
    recipe = tiny_recipe(
        folder / "run", model=model, data=data, steps=150, batch_size=32, learning_rate=4e-3, checkpoint_every=150,
        log_every=50, evaluation=evaluation,
    )  # fmt: skip
    return train(recipe)


def plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def written(folder: Path) -> Path:
    for name, colour in COLOURS.items():
        plain(colour).save(folder / f"{name}.png")
    lines = [f'{{"image": "{name}.png", "caption": "{name}的布"}}\n' for name in COLOURS]
    (folder / "goods.jsonl").write_text("".join(lines) * 4, "utf-8")
    return folder / "goods.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("passes", [0, 4])
def test_what_was_learned_is_drawn(drawn: Path, passes: int) -> None:
    m6 = Session.load(drawn)
    asked = [{"caption": f"{name}的布"} for name in COLOURS]
    pictures = list(m6.run_many("text_to_image", asked, decoding={"passes": passes, "temperature": 0, "noise": 0}))
    codec = m6.codec
    assert codec is not None
    learned = [codec.decode(codec.encode(plain(colour))) for colour in COLOURS.values()]  # as the codec has them
    for number, picture in enumerate(pictures):
        apart = [np.abs(np.asarray(picture, int) - np.asarray(other, int)).mean() for other in learned]
        assert int(np.argmin(apart)) == number
        assert apart[number] < 0.5 * sorted(apart)[1]
    # The same checkpoint describes.
    for name, colour in COLOURS.items():
        assert m6.run("caption", photo=plain(colour)) == f"{name}的布"


@pytest.mark.slow
def test_its_codec_is_part_of_the_model(drawn: Path) -> None:
    m6, codec = Session.load(drawn), load_network(Codec, drawn / "codec")
    assert m6.processor.tokenizer.num_codes == codec.config.num_codes == 125
    assert m6.model.config.vocab_size == m6.processor.tokenizer.vocab_size
    measured = [line for line in logged(drawn.parent) if "perplexity" in line]
    assert measured[-1]["perplexity"] < 1.5


@pytest.mark.slow
def test_the_command_writes_a_picture(drawn: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    command = ("run", drawn, "text_to_image")
    done = run_openm6(*command, "caption=红色的布", "--output", target, "-o", "seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target)
    assert Image.open(target).size == (16, 16)
    done = run_openm6(*command, "--output", target)
    assert done.returncode and "nothing is asked for: give caption" in done.stderr
    done = run_openm6(*command, "caption=红色的布", "-o", "passes=-2")
    assert done.returncode == 2
    assert "passes is -2" in done.stderr


def test_a_model_without_a_codec_says_so(tmp_path: Path) -> None:
    data = [{"source": "demo:catalogue/train?pictures=20", "task": "text_to_image"}]
    with pytest.raises(UsageError, match=r"this model has no image codec.*model.codec"):
        train(tiny_recipe(tmp_path, data=data))


def test_a_tokenizer_with_too_few_codes_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_network(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[8, 8], depth=1)), tmp_path / "codec")
    first = tiny_recipe(tmp_path / "first", steps=1)
    train(first)
    recipe = tiny_recipe(tmp_path / "second", model={"preset": "demo", "sizes": SIZES, "codec": tmp_path / "codec"})
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["tokenizer"] = {"path": str(tmp_path / "first" / "model")}
    with pytest.raises(UsageError, match=r"has ids for 8 image codes; the codec .* has 64"):
        train(check_recipe(values))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "experts_per_token": 2, "bias_update": 0.01}])
def test_a_picture_of_one_tile_trains_as_without_tiles(tmp_path: Path, experts: dict[str, Any]) -> None:
    """Block-sparse pictures are worked on apart from texts, and apart by kind; with one tile nothing is left out."""
    torch.manual_seed(0)
    save_network(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4])), tmp_path / "codec")
    data = [
        {"source": str(written(tmp_path)), "task": "text_to_image", "weight": 3},
        {"source": str(written(tmp_path)), "task": "caption"},
    ]
    losses = []
    for name, sizes in (("full", {}), ("tiled", {"picture_side": 4, "picture_tile": [4, 4]})):
        model = {"preset": "demo", "codec": str(tmp_path / "codec"), "sizes": {**SIZES, **experts, **sizes}}
        train(
            tiny_recipe(tmp_path / name, model=model, data=data, steps=6, batch_size=24, precision="fp32", log_every=1)
        )
        losses.append([line["loss"] for line in logged(tmp_path / name) if "loss" in line])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
