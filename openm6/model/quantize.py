"""From vectors to codes of a small set and back, with gradients: the middle of an image codec."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class FiniteScalars(nn.Module):
    """FSQ (Mentzer et al. 2023, arXiv 2309.15505): each of a few dimensions is squashed and rounded to one of its
    levels. The codes are all combinations of levels: there is no codebook to learn.

    What comes is first brought to mean 0 and deviation 1 by running figures. Without that an encoder keeps to a few
    levels for long: 3% of the codes after 300 steps of a small one, with it 90% (the same pictures and steps).

    Vectors [..., dims], each number in -1 to 1. In training all processes have to take part in each forward pass.
    """

    mean_E: Tensor
    std_E: Tensor

    def __init__(self, levels: list[int], decay: float = 0.9):
        super().__init__()
        self.levels, self.dims, self.num_codes, self.decay = levels, len(levels), math.prod(levels), decay
        self.register_buffer("mean_E", torch.zeros(self.dims))
        self.register_buffer("std_E", torch.zeros(self.dims))  # zeros: nothing was seen yet

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors rounded (gradients pass as if they had not been), their codes int64 [...], and a loss of zero."""
        levels_E, steps_E = self._tables(x)
        x = x.float()
        if self.training:
            self._follow(x.detach().reshape(-1, self.dims))
        bounded = _into_reach((x - self.mean_E) / torch.where(self.std_E == 0, 1.0, self.std_E), levels_E)
        rounded = bounded + (bounded.round() - bounded).detach()
        half_E = levels_E // 2
        codes = ((rounded.detach() + half_E).long() * steps_E).sum(-1)
        return rounded / half_E, codes, x.new_zeros(())

    def vectors(self, codes: Tensor) -> Tensor:
        """int64 [...] to [..., dims]."""
        levels_E, steps_E = self._tables(codes)
        half_E = levels_E // 2
        return (codes[..., None] // steps_E % levels_E - half_E) / half_E

    @torch.no_grad()
    def _follow(self, flat_NE: Tensor) -> None:
        mean_E, square_E = flat_NE.mean(0), flat_NE.square().mean(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.stack((mean_E, square_E)) / dist.get_world_size()
            dist.all_reduce(both)
            mean_E, square_E = both
        new = 1 - self.decay * bool(self.std_E.any())
        self.mean_E.lerp_(mean_E, new)
        self.std_E.lerp_((square_E - mean_E.square()).clamp(min=1e-10).sqrt(), new)

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        steps = [math.prod(self.levels[:i]) for i in range(self.dims)]
        return torch.tensor(self.levels, device=like.device), torch.tensor(steps, device=like.device)


def _into_reach(x: Tensor, levels_E: Tensor) -> Tensor:
    """Into that of the levels: -L/2 to L/2 - 1 for an even number of them, which is not symmetric."""
    span_E = (levels_E - 1) * (1 + 1e-3) / 2
    offset_E = 0.5 * (levels_E % 2 == 0)
    return torch.tanh(x + torch.atanh(offset_E / span_E)) * span_E - offset_E


class VectorCodebook(nn.Module):
    """VQ (van den Oord et al. 2017, arXiv 1711.00937): the nearest vector of a codebook, which follows the running mean
    of what is nearest to it (appendix A.1 there). Codes start at inputs, and those out of use start again at one.

    Vectors [..., dims]. In training all processes have to take part in each forward pass.
    """

    codebook_KE: Tensor
    counts_K: Tensor
    sums_KE: Tensor

    def __init__(self, num_codes: int, dims: int, decay: float = 0.99, commitment: float = 0.25, dead: float = 0.1):
        super().__init__()
        self.num_codes, self.dims = num_codes, dims
        self.decay, self.commitment, self.dead = decay, commitment, dead
        self._begun = False
        self.register_buffer("codebook_KE", torch.zeros(num_codes, dims))
        self.register_buffer("counts_K", torch.zeros(num_codes))
        self.register_buffer("sums_KE", torch.zeros(num_codes, dims))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest vectors (gradients pass straight to `x`), their codes int64 [...], and the commitment loss."""
        x = x.float()
        flat_NE = x.detach().reshape(-1, self.dims)
        if self.training and not self._begun:
            self._begin(flat_NE)
        codes_N = (self.codebook_KE.square().sum(1) - 2 * flat_NE @ self.codebook_KE.T).argmin(1)
        nearest = self.codebook_KE[codes_N].view(x.shape)
        if self.training:
            self._follow(flat_NE, codes_N)
        loss = self.commitment * F.mse_loss(x, nearest)
        return x + (nearest - x).detach(), codes_N.view(x.shape[:-1]), loss

    def vectors(self, codes: Tensor) -> Tensor:
        """int64 [...] to [..., dims]."""
        return self.codebook_KE[codes]

    @torch.no_grad()
    def _begin(self, flat_NE: Tensor) -> None:
        """Codes start at inputs, unless they were restored from a checkpoint."""
        self._begun = True
        if not self.counts_K.any():
            self.counts_K.fill_(1.0)
            self.sums_KE.copy_(self._some(flat_NE))
            self.codebook_KE.copy_(self.sums_KE)

    def _some(self, flat_NE: Tensor) -> Tensor:
        """An input for each code, drawn at random: the same on all processes."""
        chosen_KE = flat_NE[torch.randint(len(flat_NE), (self.num_codes,), device=flat_NE.device)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(chosen_KE, 0)
        return chosen_KE

    @torch.no_grad()
    def _follow(self, flat_NE: Tensor, codes_N: Tensor) -> None:
        counts_K = torch.bincount(codes_N, minlength=self.num_codes).float()
        sums_KE = torch.zeros_like(self.sums_KE).index_add_(0, codes_N, flat_NE)
        if dist.is_initialized() and dist.get_world_size() > 1:  # the codebook is one
            dist.all_reduce(counts_K)
            dist.all_reduce(sums_KE)
        self.counts_K.lerp_(counts_K, 1 - self.decay)
        self.sums_KE.lerp_(sums_KE, 1 - self.decay)
        dead_K = self.counts_K < self.dead
        self.counts_K.masked_fill_(dead_K, 1.0)
        self.sums_KE[dead_K] = self._some(flat_NE)[dead_K]
        self.codebook_KE.copy_(self.sums_KE / self.counts_K[:, None])
