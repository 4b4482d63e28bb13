"""Drawing: the codes of a picture after a prompt, all at once in a few passes, or one after the other.

In passes (MaskGIT, Chang et al. 2022, arXiv 2202.04200; M6-UFC, NeurIPS 2021): every pass predicts all open codes,
which attend to the prompt and to each other in both directions; the most confident are kept, the others predicted
again.
The result of a row depends on that row alone: its own mask, its own random numbers.

Progressive (M6-UFC, section 3.2): every pass draws several pictures from the kept codes. The estimates select the one
that continues, whose least confident codes are drawn again, until the estimates stop rising.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openm6.core.batch import pad
from openm6.core.errors import DataError, UsageError
from openm6.core.sequence import Sequence
from openm6.inference.decoding import Options, check_room
from openm6.inference.generate import sample, tempered
from openm6.inference.steps import Steps, complete
from openm6.model import M6
from openm6.model.cache import KVCache, fill, prefill, step

OPEN = -1
"""Value of a code that is not decided."""


@dataclass(frozen=True, slots=True)
class Drawing(Options):
    """Options of drawing.

    passes        number of passes in which all codes are decided; 0 draws one code after the other
    temperature   of the codes; 0 takes the most probable
    noise         Gumbel noise on the confidence of a code, which falls to 0 in the last pass
    guidance      weight of classifier-free guidance (Ho and Salimans 2022): logits c + guidance (c - u), where u lacks
                  the prompt's droppable slots
    seed          random seed of the first row; each further row has the next number
    branches      pictures drawn in every pass, of which the one with the best estimates continues; 1 needs no estimates
    relevance     weight of the estimate of that name (log-odds), and likewise:
    fidelity
    quality
    reading       weight of the log-probability that the model, reading a candidate by the task's `reader`, writes the
                  request's text; only candidates are read, not branches
    """

    passes: int = 8
    temperature: float = 1.0
    noise: float = 4.0
    guidance: float = 0.0
    seed: int = 0
    branches: int = 1
    relevance: float = 1.0
    fidelity: float = 1.0
    quality: float = 0.0
    reading: float = 1.0

    def __post_init__(self) -> None:
        self.check_ranges(
            passes=(0, 1000), temperature=(0, 100), noise=(0, 1000), guidance=(0, 100), branches=(1, 64),
            relevance=(0, 100), fidelity=(0, 100), quality=(0, 100), reading=(0, 100), seed=(-(2**63), 2**64),
        )  # fmt: skip
        if self.branches > 1 and not self.passes:
            raise UsageError("branches are drawn in passes: give passes above 0.")


@dataclass(frozen=True, slots=True)
class Codes:
    """Token ids of image codes: `count` codes a picture, out of `number` ids from `start` on. `mask_id` stands for an
    open code. The tokens `estimates` query the estimates; their answers are `yes_id` and `no_id`."""

    start: int
    number: int
    count: int
    mask_id: int
    estimates: tuple[int, ...]
    yes_id: int
    no_id: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """codes int64 [B, count], 0 to number - 1; estimates fp32 [B, 3], log-odds of relevance, fidelity, quality."""

    codes: Tensor
    estimates: Tensor

    def score(self, drawing: Drawing) -> Tensor:
        """Weighted sum of the log-probabilities of "yes" to each estimate, fp32 [B]: one near 1 does not make up for
        another."""
        weights_E = torch.tensor((drawing.relevance, drawing.fidelity, drawing.quality), device=self.estimates.device)
        return (torch.nn.functional.logsigmoid(self.estimates) * weights_E).sum(1)


@torch.inference_mode()
def draw_steps(
    model: M6,
    prompts: Items[Sequence],
    free: Items[Sequence],
    codes: Codes,
    drawing: Drawing | None = None,
    kept: Tensor | None = None,
    seeds: Items[int] | None = None,
) -> Steps[Drawn]:
    """A picture for every prompt (a Sequence that ends where the codes begin), with the model's estimates of it.

    `free`: for guidance, the prompts without their droppable slots. `kept`, int64 [B, count]: given codes, OPEN where
    a code is drawn. `seeds`: random seed of each row; by default the drawing's seed and the numbers that follow it.
    A step is a pass, or a code; it costs a row the codes that are computed: of all branches, twice with guidance.
    """
    drawing = drawing or Drawing()
    branches = drawing.branches
    prompts = [p for p in prompts for _ in range(branches)]
    both = [*prompts, *(p for p in free if drawing.guidance for _ in range(branches))]
    longest, device = max(len(p) for p in both), model.embed.weight.device
    check_room(model, longest, codes.count + len(codes.estimates))
    hidden, cache = prefill(
        model, pad(both, pad_id=0, rounded=True).to(device), longest + codes.count + len(codes.estimates)
    )
    found = torch.full((len(prompts) // branches, codes.count), OPEN) if kept is None else kept.clone()
    found = found.repeat_interleave(branches, 0).to(device)
    rows = range(len(prompts) // branches)
    each = zip(rows, seeds or [drawing.seed + row for row in rows], strict=True)
    own = [hash((seed, 0, branch)) & 0x7FFFFFFF for _, seed in each for branch in range(branches)]
    decoder = _CodeDecoder(model, cache, codes, drawing, own)
    if branches > 1:
        return (yield from decoder.progressively(found))
    found = yield from (decoder.in_passes(found) if drawing.passes else decoder.one_by_one(found, hidden))
    return Drawn(found, decoder.estimate(found))


draw = complete(draw_steps)
"""`draw_steps` from beginning to end."""


@torch.inference_mode()
def estimate(model: M6, prompts: Items[Sequence], found: Tensor, codes: Codes) -> Drawn:
    """The model's estimates of complete pictures, int64 [B, count], as answers to these prompts."""
    device = model.embed.weight.device
    capacity = max(len(p) for p in prompts) + codes.count + len(codes.estimates)
    _, cache = prefill(model, pad(prompts, pad_id=0, rounded=True).to(device), capacity)
    return Drawn(found, _CodeDecoder(model, cache, codes, Drawing()).estimate(found.to(device)))


class _CodeDecoder:
    """Decides the open codes of rows that share one cache, each with random numbers by its own seed."""

    def __init__(self, model: M6, cache: KVCache, codes: Codes, drawing: Drawing, seeds: Items[int] = ()):
        self.model, self.cache, self.codes, self.drawing = model, cache, codes, drawing
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.times = 2 if drawing.guidance else 1  # with the prompt, and without its droppable slots

    def in_passes(self, found_BN: Tensor) -> Steps[Tensor]:
        wanted_B = (found_BN == OPEN).sum(1)
        for number in range(1, self.drawing.passes + 1):
            drawn_BN, confidence_BN = self._propose(found_BN, number)
            confidence_BN = confidence_BN.masked_fill(found_BN != OPEN, math.inf)
            found_BN = torch.where(found_BN == OPEN, drawn_BN, found_BN)
            found_BN = found_BN.masked_fill(self._reopened(confidence_BN, wanted_B, number), OPEN)
            yield [self.codes.count * self.times] * len(found_BN)
        return found_BN

    def progressively(self, found_BN: Tensor) -> Steps[Drawn]:
        """Rows come in groups of `branches` with equal prompts; one row of each group is returned."""
        branches, passes = self.drawing.branches, self.drawing.passes
        given_BN, wanted_B = found_BN != OPEN, (found_BN == OPEN).sum(1)
        groups = len(found_BN) // branches
        confidence_BN = torch.zeros(found_BN.shape, device=found_BN.device)
        best = Drawn(found_BN[::branches].clone(), torch.zeros((groups, 3), device=found_BN.device))
        highest_G = torch.full((groups,), -math.inf, device=found_BN.device)
        active_G = torch.ones(groups, dtype=torch.bool, device=found_BN.device)
        cost = branches * self.codes.count * self.times
        for number in range(1, passes + 1):
            costs = [cost * active for active in active_G.tolist()]
            drawn_BN, drawn_confidence_BN = self._propose(found_BN, number)
            whole_BN = torch.where(found_BN == OPEN, drawn_BN, found_BN)
            confidence_BN = torch.where(found_BN == OPEN, drawn_confidence_BN, confidence_BN)
            confidence_BN = confidence_BN.masked_fill(given_BN, math.inf)
            estimates_BE = self.estimate(whole_BN)
            score_GR = Drawn(whole_BN, estimates_BE).score(self.drawing).view(groups, branches)
            chosen_G = score_GR.argmax(1) + torch.arange(groups, device=found_BN.device) * branches
            # Pictures of the first half only lead on: estimates of codes that were guessed together are no guide.
            rises_G = active_G & ((score_GR.amax(1) > highest_G) | (number <= passes // 2))
            highest_G = torch.where(rises_G, score_GR.amax(1), highest_G)
            best.codes[rises_G], best.estimates[rises_G] = whole_BN[chosen_G][rises_G], estimates_BE[chosen_G][rises_G]
            # From half of the passes on, the first pass without an improvement is the last.
            active_G = active_G & (rises_G | (number <= passes // 2))
            yield costs
            if not active_G.any():
                break
            every_B = chosen_G.repeat_interleave(branches)
            found_BN, confidence_BN = whole_BN[every_B], confidence_BN[every_B]
            found_BN = found_BN.masked_fill(self._reopened(confidence_BN, wanted_B, number), OPEN)
        return best

    def one_by_one(self, found_BN: Tensor, hidden: Tensor) -> Steps[Tensor]:
        found_BN, times = found_BN.clone(), self.times
        lengths, counts = self.cache.lengths.clone(), list(self.cache.counts)
        for place in range(self.codes.count):
            logits_BK = _guided(self.model.logits(hidden), self.codes, self.drawing)
            drawn_B = _select_codes(logits_BK, self._uniform(1)[:, 0], self.drawing.temperature)
            found_BN[:, place] = torch.where(found_BN[:, place] == OPEN, drawn_B, found_BN[:, place])
            if place + 1 < self.codes.count:
                ids_B = (self.codes.start + found_BN[:, place]).repeat(times)
                hidden = step(self.model, ids_B, self.cache, place, self.codes.count, reproducible=True)
            yield [times] * len(found_BN)
        self.cache.lengths, self.cache.counts = lengths, counts  # as after the prompt
        return found_BN

    def estimate(self, found_BN: Tensor) -> Tensor:
        """Log-odds of each estimate, fp32 [B, 3], of pictures after the prompts (not those without droppable slots)."""
        queries_BE = torch.tensor(self.codes.estimates, device=found_BN.device).expand(len(found_BN), -1)
        ids_BN = torch.cat((self.codes.start + found_BN, queries_BE), 1)
        hidden = fill(self.model, ids_BN, self.cache.part(slice(len(found_BN))), self.codes.count)
        logits = self.model.logits(hidden[:, self.codes.count :])
        return logits[..., self.codes.yes_id] - logits[..., self.codes.no_id]

    def _uniform(self, count: int) -> Tensor:
        """Uniform numbers, fp32 [B, count]."""
        return torch.stack([torch.rand(count, generator=g) for g in self.generators]).to(self.cache.lengths.device)

    def _propose(self, found_BN: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """A code for every place, and its confidence with the pass's noise, both [B, N]."""
        codes, drawing = self.codes, self.drawing
        ids_BN = torch.where(found_BN == OPEN, codes.mask_id, codes.start + found_BN)
        hidden = fill(self.model, ids_BN.repeat(self.times, 1), self.cache, codes.count)
        logits_BNK = _guided(self.model.logits(hidden), codes, drawing)
        drawn_BN = _select_codes(logits_BNK, self._uniform(codes.count), drawing.temperature)
        confidence_BN = logits_BNK.log_softmax(-1).gather(2, drawn_BN[..., None]).squeeze(2)
        gumbel_BN = -(-self._uniform(codes.count).clamp(1e-9, 1 - 1e-7).log()).log()
        return drawn_BN, confidence_BN + drawing.noise * (1 - number / drawing.passes) * gumbel_BN

    def _reopened(self, confidence_BN: Tensor, wanted_B: Tensor, number: int) -> Tensor:
        """The codes that are open again after a pass, bool [B, N]: by a cosine schedule, of `wanted_B` at first."""
        again_B = (math.cos(math.pi / 2 * number / self.drawing.passes) * wanted_B + 1e-6).floor()
        return confidence_BN.argsort(dim=1).argsort(dim=1) < again_B[:, None]


def _guided(logits: Tensor, codes: Codes, drawing: Drawing) -> Tensor:
    """Logits of the codes, [B, ..., K], with guidance applied."""
    logits = logits[..., codes.start : codes.start + codes.number]
    if not drawing.guidance:
        return logits
    prompted, free = logits.chunk(2)
    return prompted + drawing.guidance * (prompted - free)


def _select_codes(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return sample(tempered(logits.flatten(0, -2), temperature), uniform.flatten()).view(uniform.shape)


def kept_codes(given: list[np.ndarray | None], codes: Codes) -> Tensor:
    """Given codes, OPEN elsewhere, int64 [B, count]. Raises DataError for codes that the codec does not have."""
    kept = torch.full((len(given), codes.count), OPEN)
    for row, one in zip(kept, given, strict=True):
        if one is not None:
            found = torch.as_tensor(np.asarray(one).ravel().astype(np.int64))
            if len(found) != codes.count or found.min() < OPEN or found.max() >= codes.number:
                raise DataError(f"kept has to be {codes.count} codes below {codes.number}, or -1.")
            row[:] = found
    return kept
