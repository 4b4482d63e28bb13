"""Drawing: the codes of a picture after a prompt, all at once in a few passes, or one after the other.

In passes (MaskGIT, Chang et al. 2022, arXiv 2202.04200; M6-UFC, NeurIPS 2021): every pass proposes all codes that are
still open, which see the prompt and each other both ways; the surest stay, the others are asked again.
What a row gets depends on that row alone: its own mask, its own random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.decode.generate import check_ranges, check_room, options, sample
from openm6.model import M6
from openm6.sequence import Sequence, pad

OPEN = -1
"""In the place of a code that is not decided."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How to draw.

    passes        in which all codes are decided; 0 writes them one after the other
    temperature   of the codes; 0 takes the likeliest
    noise         Gumbel noise on how sure a code is, falling to nothing in the last pass
    guidance      how much further than the prompt says, away from what would be drawn without its droppable parts
                  (classifier-free guidance, Ho and Salimans 2022): logits c + guidance (c - u)
    seed          of the random numbers; row i draws from seed and i
    """

    passes: int = 8
    temperature: float = 1.0
    noise: float = 4.0
    guidance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, passes=(0, 1000), temperature=(0, 100), noise=(0, 1000), guidance=(0, 100))

    @classmethod
    def of(cls, **values: Any) -> Drawing:
        """From keywords, e.g. a task's defaults and a user's wishes; an unknown one is a UsageError."""
        return options(cls, values)


@dataclass(frozen=True, slots=True)
class Codes:
    """The ids of image codes: `count` a picture, of `number` different ones from the id `start` on; `mask_id` stands
    for one that is open."""

    start: int
    number: int
    count: int
    mask_id: int


@torch.inference_mode()
def draw(
    model: M6,
    prompts: Items[Sequence],
    free: Items[Sequence],
    codes: Codes,
    drawing: Drawing | None = None,
    kept: Tensor | None = None,
    numbers: Items[int] | None = None,
) -> Tensor:
    """Codes 0 to number - 1 for every prompt (a Sequence that ends where the codes begin), int64 [B, count].

    `free` are the prompts without their droppable parts, for guidance. `kept`, int64 [B, count]: codes that are given,
    OPEN where one has to be drawn. `numbers`: of the rows, for their random numbers; 0, 1, ... by default.
    """
    drawing = drawing or Drawing()
    both = [*prompts, *(free if drawing.guidance else [])]
    longest, device = max(len(p) for p in both), model.embed.weight.device
    check_room(model, longest, codes.count)
    hidden, cache = model.prefill(pad(both, pad_id=0).to(device), longest + codes.count)
    found = torch.full((len(prompts), codes.count), OPEN, device=device) if kept is None else kept.clone().to(device)
    seeds = [hash((drawing.seed, row)) & 0x7FFFFFFF for row in numbers or range(len(prompts))]
    chance = _Chance([torch.Generator().manual_seed(seed) for seed in seeds], device)
    if drawing.passes:
        return _in_passes(model, cache, found, codes, drawing, chance)
    return _one_by_one(model, cache, hidden, found, codes, drawing, chance)


class _Chance:
    """Uniform numbers [B, N], each row from a generator of its own."""

    def __init__(self, generators: list[torch.Generator], device: torch.device):
        self.generators, self.device = generators, device

    def __call__(self, count: int) -> Tensor:
        return torch.stack([torch.rand(count, generator=g) for g in self.generators]).to(self.device)


def _in_passes(model: M6, cache: Any, found_BN: Tensor, codes: Codes, drawing: Drawing, chance: _Chance) -> Tensor:
    wanted_B = (found_BN == OPEN).sum(1)
    for number in range(1, drawing.passes + 1):
        ids_BN = torch.where(found_BN == OPEN, codes.mask_id, codes.start + found_BN)
        times = 2 if drawing.guidance else 1
        logits_BNK = _guided(model.logits(model.fill(ids_BN.repeat(times, 1), cache)), codes, drawing)
        drawn_BN = _choose(logits_BNK, chance(codes.count), drawing.temperature)
        sure_BN = logits_BNK.log_softmax(-1).gather(2, drawn_BN[..., None]).squeeze(2)
        share = number / drawing.passes
        gumbel_BN = -(-chance(codes.count).clamp(1e-9, 1 - 1e-7).log()).log()
        sure_BN = sure_BN + drawing.noise * (1 - share) * gumbel_BN
        sure_BN = sure_BN.masked_fill(found_BN != OPEN, math.inf)
        # A cosine of what was open at first is asked again.
        again_B = (math.cos(math.pi / 2 * share) * wanted_B + 1e-6).floor()
        rank_BN = sure_BN.argsort(dim=1).argsort(dim=1)
        found_BN = torch.where(found_BN == OPEN, drawn_BN, found_BN)
        found_BN = found_BN.masked_fill(rank_BN < again_B[:, None], OPEN)
    return found_BN


def _one_by_one(
    model: M6, cache: Any, hidden: Tensor, found_BN: Tensor, codes: Codes, drawing: Drawing, chance: _Chance
) -> Tensor:
    found_BN = found_BN.clone()
    times = 2 if drawing.guidance else 1
    for place in range(codes.count):
        logits_BK = _guided(model.logits(hidden), codes, drawing)
        drawn_B = _choose(logits_BK, chance(1)[:, 0], drawing.temperature)
        found_BN[:, place] = torch.where(found_BN[:, place] == OPEN, drawn_B, found_BN[:, place])
        if place + 1 < codes.count:
            hidden = model.step((codes.start + found_BN[:, place]).repeat(times), cache)
    return found_BN


def _guided(logits: Tensor, codes: Codes, drawing: Drawing) -> Tensor:
    """Of the codes alone, [B, ..., K]."""
    logits = logits[..., codes.start : codes.start + codes.number]
    if not drawing.guidance:
        return logits
    prompted, free = logits.chunk(2)
    return prompted + drawing.guidance * (prompted - free)


def _choose(logits: Tensor, chance: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return sample(logits.flatten(0, -2) / temperature, chance.flatten()).view(chance.shape)
