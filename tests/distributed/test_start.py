"""A network that no process ever holds as a whole starts as one that one process holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openm6.model import M6
from openm6.model.files import meta_model, save_network
from openm6.train import start
from openm6.train.distributed import process_group, whole
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection
from openm6.train.start import start_at_random, start_from
from tests.conftest import tiny_config
from tests.processes import run_ranks

# Sizes that two and four do not divide.
SIZES = {"vocab_size": 97, "hidden_size": 42, "num_attention_heads": 3, "num_experts": 4, "bias_update": 1e-3}
SECTIONS: list[dict[str, Any]] = [
    {},
    {"sharding": "zero2"},
    {"sharding": "zero3", "experts": 2, "offload": 0.5},
    {"sharding": "zero3", "experts": 2, "offload": {"optimizer": 1.0}},
]


def build(folder: Path) -> None:
    """Every way to lay the network out, from a seed and from the model directory `folder`."""
    start.BLOCK = 100
    with process_group() as group:
        for number, section in enumerate(SECTIONS):
            for way in ("seed", "stored"):
                model = meta_model(tiny_config(**SIZES))
                parallel = Parallel(model, ParallelSection.model_validate(section), group, torch.float32)
                parallel.allocate()
                if way == "seed":
                    start_at_random(model, 7)
                else:
                    start_from(model, folder, 0)
                tensors = {name: whole(tensor).contiguous() for name, tensor in model.state_dict().items()}
                if group.first:
                    save_file(tensors, folder / f"{way}-{number}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_layout_starts_as_one_process(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = M6(tiny_config(**SIZES))
    save_network(saved, tmp_path)
    monkeypatch.setattr(start, "BLOCK", 100)
    alone = meta_model(saved.config).to_empty(device="cpu")
    start_at_random(alone, 7)
    run_ranks(processes, build, tmp_path)
    for number in range(len(SECTIONS)):
        for way, wanted in (("seed", alone), ("stored", saved)):
            found = load_file(tmp_path / f"{way}-{number}.safetensors")
            for name, tensor in wanted.state_dict().items():
                assert torch.equal(found[name], tensor), (SECTIONS[number], way, name)
