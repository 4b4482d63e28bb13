"""The bytes of a plan against those that real processes hold after a step."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from openm6.core.batch import pack
from openm6.model import M6, ModelConfig
from openm6.model.files import meta_model
from openm6.plan.footprint import Layout, States, places, states_by_layer, weights_of
from openm6.plan.planner import dry_run
from openm6.train.distributed import local, process_group
from openm6.train.offload import Offload
from openm6.train.optimizer import make_optimizers
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection, TrainSection
from tests.conftest import example, tiny_config
from tests.plan.test_footprint import bytes_of
from tests.processes import run_ranks

# Sizes that two and four do not divide.
UNEVEN = {
    "vocab_size": 97,
    "hidden_size": 42,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
}
SPARSE = {**UNEVEN, "num_experts": 6, "experts_per_token": 2, "shared_intermediate_size": 18, "expert_interval": 2}
# Blocks of 256 numbers.
EVEN = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 4}
CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (UNEVEN, {}, "adamw"),
    (UNEVEN, {"sharding": "zero2"}, "adamw"),
    (UNEVEN, {"sharding": "zero3", "recompute": "full"}, "muon"),
    (SPARSE, {"sharding": "zero2", "experts": 2}, "adamw"),
    (SPARSE, {"sharding": "zero3", "experts": 2, "recompute": "full"}, "adamw"),
    (SPARSE, {"sharding": "zero3", "recompute": "selective"}, "muon"),
    ({**SPARSE, "distinct_layers": 1, "expert_interval": 1}, {"sharding": "zero3", "experts": 2}, "adamw"),
    (EVEN, {"sharding": "zero3", "experts": 2}, "adafactor"),
    (SPARSE, {"sharding": "zero2", "experts": 2, "offload": {"optimizer": 0.67}}, "adamw"),
    (SPARSE, {"sharding": "zero3", "offload": {"parameters": 0.34, "gradients": 1, "optimizer": 0.67}}, "muon"),
]
if find_spec("torchao"):
    CASES.append((EVEN, {"sharding": "zero3", "experts": 2}, "adam8bit"))


def config_of(sizes: dict[str, Any]) -> ModelConfig:
    return tiny_config(**sizes)


def measure(held_file: Path) -> None:
    """Every process takes a step of every case; the first one writes what the fullest holds."""
    torch.set_num_threads(1)
    found = []
    with process_group() as group:
        for sizes, section, optimizer in CASES:
            torch.manual_seed(0)
            model = M6(config_of(sizes)).train()
            settings = ParallelSection.model_validate(section)
            parallel = Parallel(model, settings, group, torch.float32)
            optimizers = make_optimizers(model, TrainSection(steps=1, optimizer=optimizer))  # type: ignore[arg-type]
            rng = np.random.default_rng(group.rank)
            batch = pack([example(rng, 20, 12, ((1, 4),))], 64, 0)
            (parallel.run(batch).loss * parallel.scale).backward()
            away = parallel.host.gradients if parallel.host else {}
            gradients = sum(local(away.get(p, p.grad)).nbytes for p in model.parameters())
            parallel.update(optimizers)
            offload = Offload.of(settings.offload, len(model.blocks))
            states = {p: state for o in optimizers for p, state in o.state.items()}
            counts = 0  # of steps, which do not leave the device
            for number in range(offload.parameters, offload.optimizer):
                counts += sum(
                    v.nbytes for p in model.blocks[number].parameters() for v in states[p].values() if not v.ndim
                )
            held = torch.tensor([
                sum(local(p).nbytes for p in model.parameters()),
                gradients,
                sum(bytes_of(local(v)) for state in states.values() for v in state.values()),
                counts + parallel.host.bytes if parallel.host else 0,
            ])  # fmt: skip
            everyone = [torch.zeros_like(held) for _ in range(group.world)]
            dist.all_gather(everyone, held)
            if group.first:
                fullest = max(everyone, key=lambda one: int(one.sum()))
                found.append(fullest.tolist())
        if group.first:
            held_file.write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_states_are_those_of_the_fullest_process(processes: int, tmp_path: Path) -> None:
    run_ranks(processes, measure, tmp_path / "held.json")
    held = json.loads((tmp_path / "held.json").read_text())
    assert len(held) == len(CASES)
    for (sizes, settings, optimizer), found in zip(CASES, held, strict=True):
        config, section = config_of(sizes), ParallelSection.model_validate(settings)
        offload = Offload.of(section.offload, config.distinct_layers or config.num_hidden_layers)
        layout = Layout(processes, section.sharding, section.experts, section.recompute, offload)
        by_layer = states_by_layer(weights_of(meta_model(config)), layout, optimizer)
        planned = sum(by_layer.values(), States())
        guests = places(by_layer, offload).guest.total
        assert [planned.parameters, planned.gradients, planned.optimizer, guests] == found, (sizes, settings, optimizer)
        assert dry_run(config, layout, optimizer) == by_layer
