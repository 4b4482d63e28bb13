"""A few training steps of a tiny network of experts, alone or on several processes.

`main` writes for every case losses, gradient norms, the rows that experts received on every process, and all gradients
of the last step. It is called in processes of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from openm6.core.batch import pack
from openm6.core.sequence import IGNORE
from openm6.model import M6
from openm6.train import optimizer
from openm6.train.distributed import Group, process_group, whole
from openm6.train.expert_statistics import ExpertStatistics, balance_loss
from openm6.train.optimizer import make_optimizers
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection, TrainSection
from tests.conftest import example, tiny_config

STEPS = 3


def main(cases: dict[str, dict[str, Any]], output: Path) -> None:
    optimizer.fast_dtype = lambda _: torch.float32  # its rounding would hide what is compared
    with process_group() as group:
        for name, settings in cases.items():
            told, gradients = steps(settings, group)
            if group.first:
                folder = output / name
                folder.mkdir(parents=True)
                save_file(gradients, folder / "gradients.safetensors")
                (folder / "told.json").write_text(json.dumps(told))


def steps(settings: dict[str, Any], group: Group) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = M6(tiny_config(initializer_range=0.08, **settings["sizes"])).train()
    if settings.get("frozen"):
        model.image.requires_grad_(False)
    parallel = Parallel(model, ParallelSection(**settings.get("parallel", {})), group, torch.float32)
    train = TrainSection(steps=STEPS, optimizer=settings.get("optimizer", "adamw"), learning_rate=1e-2)
    optimizers = make_optimizers(model, train)
    statistics = ExpertStatistics(model, group)
    rng = np.random.default_rng(0)
    losses, norms = [], []
    for _ in range(STEPS):
        examples = [example(rng, 3 + i % 5, 4 + i % 3, ((2, 2),) * (i % 2)) for i in range(16)]
        trained = sum(int((e.labels != IGNORE).sum()) for e in examples)
        positions = sum(len(e) for e in examples)
        mine = examples[group.rank :: group.world]
        statistics.start_step()
        total = torch.zeros(())
        parts = settings.get("accumulate", 1)
        for part in range(parts):
            last = part == parts - 1
            output = parallel.run(pack(mine[part::parts], 64, 0))
            parallel.synchronize(last)
            loss = output.loss / trained + balance_loss(output.router_statistics) / positions
            (loss * parallel.scale).backward()
            statistics.add(output.router_statistics, more=not last)
            total += loss.detach()
        statistics.finish_step()
        norms.append(float(parallel.clip(0.5)))
        losses.append(float(group.sum(total)))
        away = parallel.host.gradients if parallel.host else {}
        found = {name: away.get(p, p.grad) for name, p in model.named_parameters()}
        gradients = {name: whole(gradient).clone() for name, gradient in found.items() if gradient is not None}
        parallel.update(optimizers)
    exchanges = [layer.exchange for layer in statistics.layers if layer.exchange is not None]
    received = torch.tensor([exchange.rows_received for exchange in exchanges], dtype=torch.int64)
    everyone = [torch.empty_like(received) for _ in range(group.world)]
    if group.world > 1:
        torch.distributed.all_gather(everyone, received)
    told = {"losses": losses, "norms": norms, "received": [r.tolist() for r in everyone]}
    return {**told, "host_bytes": parallel.host.bytes if parallel.host else 0}, gradients
