"""FSDP2, expert parallelism and recomputation: losses and gradients of 2 and 4 processes are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openm6.core.errors import UsageError
from openm6.train.distributed import Group
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection
from tests.conftest import tiny_model
from tests.distributed import steps
from tests.processes import run_ranks

SIZES = {"num_experts": 8, "experts_per_token": 2, "shared_intermediate_size": 16, "router": "prototype"}
AUXILIARY = {**SIZES, "router": "topk", "auxiliary_loss": 0.1}

# What one process does, and how several do the same.
ALONE: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "adafactor": {"optimizer": "adafactor"},
    "auxiliary": {"sizes": AUXILIARY},
    "frozen": {"frozen": True},
}
TOGETHER: dict[str, tuple[int, str, dict[str, Any]]] = {
    "data parallel": (2, "auxiliary", {}),
    "auxiliary, recompute": (2, "auxiliary", {"parallel": {"sharding": "zero3", "recompute": "full"}}),
    "frozen, zero3": (2, "frozen", {"parallel": {"sharding": "zero3"}}),
    "zero2": (2, "adamw", {"parallel": {"sharding": "zero2"}}),
    "zero3, recompute": (2, "muon", {"parallel": {"sharding": "zero3", "recompute": "selective"}}),
    "1 x 2": (2, "muon", {"parallel": {"sharding": "zero3", "experts": 2}, "accumulate": 2}),
    "1 x 2, adafactor": (2, "adafactor", {"parallel": {"sharding": "zero3", "experts": 2}}),
    "1 x 2, selective": (
        2,
        "adamw",
        {"parallel": {"sharding": "zero3", "experts": 2, "recompute": "selective"}},
    ),
    "half offloaded": (2, "adamw", {"parallel": {"sharding": "zero3", "offload": 0.5}}),
    "all offloaded": (2, "muon", {"parallel": {"sharding": "zero2", "experts": 2, "offload": 1.0}}),
    "moments offloaded": (2, "adafactor", {"parallel": {"sharding": "zero3", "offload": {"optimizer": 1.0}}}),
    "gradients offloaded": (
        2,
        "adamw",
        {"parallel": {"sharding": "zero2", "experts": 2, "offload": {"gradients": 1.0}}, "accumulate": 2},
    ),
    "offloaded by degrees": (
        2,
        "muon",
        {"parallel": {"sharding": "zero3", "offload": {"parameters": 0.5, "gradients": 1.0, "optimizer": 1.0}}},
    ),
    "4 x 1": (4, "adamw", {"parallel": {"sharding": "zero3"}}),
    "2 x 2": (4, "adamw", {"parallel": {"sharding": "zero2", "experts": 2, "recompute": "full"}}),
    "1 x 4": (4, "auxiliary", {"parallel": {"sharding": "zero3", "experts": 4}}),
    "2 x 2, auxiliary": (4, "auxiliary", {"parallel": {"sharding": "zero3", "experts": 2}}),
}
ROUTERS = {
    router: {"sizes": {**SIZES, "router": router}, "parallel": {"sharding": "zero3", "experts": 2}}
    for router in ("prototype", "grouped", "topk")
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all cases: one start for each number of processes, for a start takes seconds."""
    folder = tmp_path_factory.mktemp("steps")
    cases: dict[int, dict[str, dict[str, Any]]] = {1: ALONE, 2: dict(ROUTERS), 4: {}}
    for name, (processes, base, more) in TOGETHER.items():
        cases[processes][name] = {**ALONE[base], **more}
    for processes, named in cases.items():
        run_ranks(
            processes, steps.main, {name: {"sizes": SIZES, **settings} for name, settings in named.items()}, folder
        )
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "told.json").read_text()), load_file(folder / "gradients.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_losses_and_gradients_are_those_of_one_process(found: Path, name: str) -> None:
    alone, wanted = read(found / TOGETHER[name][1])
    together, gradients = read(found / name)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert gradients.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[parameter], gradient, atol=2e-6, rtol=2e-3, msg=lambda text, n=parameter: f"{n}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_groups_on_processes_get_the_same_number_of_tokens_each(found: Path, router: str) -> None:
    """A group a process: by construction each token has one expert on each of them."""
    first, second = read(found / router)[0]["received"]
    assert sum(first) > 0
    assert (first == second) == (router != "topk")


def test_what_cannot_be_laid_out_is_refused() -> None:
    two = Group(0, 2, torch.device("cpu"))
    for sizes, parallel, message in (
        ({}, {"experts": 2, "sharding": "zero3"}, "parallel.experts is 2, but this model has no experts"),
        (
            {"num_experts": 3},
            {"experts": 2, "sharding": "zero3"},
            r"parallel.experts \(2\) has to divide the number of experts \(3\)",
        ),
        ({"num_experts": 6}, {"experts": 3, "sharding": "zero3"}, r"has to divide the number of processes \(2\)"),
        ({"num_experts": 4}, {"experts": 2}, "needs parallel.sharding zero2 or zero3"),
        ({}, {"offload": 0.5}, "parallel.offload needs parallel.sharding"),
        ({}, {"sharding": "zero3"}, "needs processes to shard over"),
    ):
        with pytest.raises(UsageError, match=message):
            Parallel(tiny_model(**sizes), ParallelSection(**parallel), two, torch.float32)
