"""Lay a network over processes that do not exist, and look at what the first one would hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from openm6.core.errors import OpenM6Error
from openm6.model import ModelConfig
from openm6.model.files import layer_of, meta_model
from openm6.model.roles import role_of
from openm6.plan.footprint import Layout, States, states_of
from openm6.train.distributed import Group, local
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection


@contextmanager
def fake_group(world: int) -> Iterator[Group]:
    """Process 0 of `world`, the others imagined: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise OpenM6Error("A dry run has to be alone: this process belongs to a group already.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Group(0, world, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def dry_run(config: ModelConfig, layout: Layout, optimizer: str) -> dict[int | None, States]:
    """Bytes of process 0 by distinct layer (None: outside of the blocks), read off the shards that train/parallel.py
    makes; the fullest, because what does not divide evenly falls on the first processes."""
    settings = ParallelSection.model_validate(
        {"sharding": layout.sharding, "experts": layout.experts, "recompute": layout.recompute}
    )
    model = meta_model(config)
    if layout.sharding == "none":  # every process holds everything
        return _read(model, optimizer)
    with fake_group(layout.world) as group:
        Parallel(model, settings, group, torch.bfloat16)
        return _read(model, optimizer)


def _read(model: torch.nn.Module, optimizer: str) -> dict[int | None, States]:
    found: dict[int | None, States] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        found[layer] = found.get(layer, States()) + states_of(
            role_of(model, name), tuple(local(parameter).shape), optimizer
        )
    return found
