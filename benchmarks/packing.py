"""Packing against padding: the same examples of the demo's mixture, trained in packed rows and in padded ones.

Both sides do the whole step (forward, backward, clipping, AdamW) on the same examples; `padded` gives every example a
row of its own, as long as the longest. A third side pads after sorting a larger group by length, the usual remedy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import race, training_step
from openm6.core.batch import Batch, pack, pad
from openm6.core.sequence import Sequence
from openm6.data.loader import Loader
from openm6.model import M6
from openm6.model.precision import fast_dtype
from openm6.train.distributed import Group
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection, Recipe, load_recipe
from openm6.train.setup import build_entries, build_session
from openm6.train.start import start_at_random

TITLE = "Packing against padding, on the demo catalogue's own mixture of lengths"
GROUPS, BATCH = {"demo": 8, "small": 2}, 64


def run(name: str = "demo", groups: Mapping[str, int] = GROUPS, batch: int = BATCH) -> tuple[list[dict[str, Any]], str]:
    """`name`: the recipe, by name or path; `groups`: how many steps' examples of each preset."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for preset, steps in groups.items():
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe(name, [f"output={folder}", f"model.preset={preset}"])
            for section in recipe.data:
                section.start = 0
            rows += _race(recipe, preset, device, steps, batch)
    note = (
        f"Steps of {batch} examples, the same on all sides; median of 5 rounds in turn, spread = quartiles. Packing "
        "saves positions; the stem, which sees every picture once on all sides, and the optimizer stay. `small` takes "
        "up to 64 patches of a picture, so its examples are nearly alike in length."
    )
    return rows, note


def _race(recipe: Recipe, preset: str, device: torch.device, steps: int, count: int) -> list[dict[str, Any]]:
    sequences, model = _examples(recipe, steps, count, device)
    groups = [sequences[i : i + count] for i in range(0, len(sequences), count)]
    by_length = sorted(sequences, key=len)
    alike = [by_length[i : i + count] for i in range(0, len(by_length), count)]
    batches = {
        "packed": [pack(g, recipe.train.row_length, 0, balance_rows=device.type == "cpu").to(device) for g in groups],
        "padded": [pad(g, 0).to(device) for g in groups],
        "padded, sorted by length": [pad(g, 0).to(device) for g in alike],
    }
    real = sum(map(len, sequences))
    step = training_step(model)

    def loss(batch: Batch) -> Tensor:
        output = model(batch)
        return output.loss / len(output.losses)

    def steps_of(some: list[Batch]) -> None:
        for batch in some:
            step(partial(loss, batch))

    timings = race({name: partial(steps_of, some) for name, some in batches.items()}, repeats=5)
    mine = timings["packed"].median
    lengths = sorted(map(len, sequences))
    return [
        {
            "network": preset,
            "positions an example": f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}",
            "side": name,
            "examples/s": round(len(sequences) / t.median),
            "spread": f"{len(sequences) / t.high:,.0f} to {len(sequences) / t.low:,.0f}",
            "positions that are no padding": round(real / sum(b.ids.numel() for b in batches[name]), 3),
            "packed is faster by": round(t.median / mine, 2),
        }
        for name, t in timings.items()
    ]


def _examples(recipe: Recipe, steps: int, count: int, device: torch.device) -> tuple[list[Sequence], M6]:
    group = Group(0, 1, device)
    session = build_session(recipe, group)
    entries, _ = build_entries(recipe, session, group)
    loader = Loader(entries, session.processor, count, threads=0)
    model = session.model.train()
    Parallel(model, ParallelSection(), group, fast_dtype(device.type)).allocate()
    start_at_random(model, 0)
    return [s for step in islice(loader, steps) for s in step], model
