"""A training run that takes a second: a tiny network on a few pictures of the catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from openm6.train.recipe import Recipe, check_recipe

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "stem_widths": [8, 8, 8], "image_max_patches": 4,
}  # fmt: skip


def tiny_recipe(output: Path, **changes: Any) -> Recipe:
    """A recipe with `train` keys changed; `data` and `evaluation` as given."""
    train = {
        "steps": 6, "batch_size": 8, "row_length": 96, "warmup": 2, "checkpoint_every": 3, "log_every": 1,
        "precision": "fp32", "workers": 0,
    }  # fmt: skip
    data = changes.pop("data", None) or [
        {"source": "demo:questions/train?pictures=30", "task": "vqa", "name": "questions"},
        {"source": "demo:catalogue/train?pictures=30", "task": "masked_captioning", "name": "captions"},
    ]
    sections = {
        key: changes.pop(key)
        for key in ("model", "evaluation", "seed", "adapt", "vectors", "distill")
        if key in changes
    }
    return check_recipe(
        {
            "name": "tiny",
            "output": output,
            "model": {"preset": "demo", "sizes": SIZES},
            "tokenizer": {"vocab_size": 800, "characters": 100, "num_codes": 8},
            "data": data,
            "train": {**train, **changes},
            **sections,
        }
    )


def recipe_file(recipe: Recipe, folder: Path) -> Path:
    """The recipe as a YAML file, for a command to read."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), "utf-8")
    return file


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]


def losses(output: Path) -> dict[int, float]:
    """The loss of every logged step; of a step that was done twice, the last."""
    return {line["step"]: line["loss"] for line in logged(output) if "loss" in line}


class PowerCutError(Exception):
    pass


def cut_at(step: int) -> Any:
    def look(line: dict[str, Any]) -> None:
        if line["step"] == step:
            raise PowerCutError

    return look
