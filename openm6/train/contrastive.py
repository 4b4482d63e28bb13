"""Contrastive training of two towers (InfoNCE, arXiv 1807.03748).

Both towers are one network with two instructions. Among the N pairs of a step, over all processes, each side has to
identify its partner among all others (and the hard negatives), by cosine similarity over a temperature. With several
`dims` the loss is also taken on the first numbers of each vector, so that vectors can be truncated (Matryoshka, arXiv
2205.13147).
"""

from __future__ import annotations

from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from openm6.train.distributed import Group


def contrast(
    queries_ND: Tensor, keys_MD: Tensor, groups: list[str], temperature: float, dims: list[int], group: Group
) -> Tensor:
    """The loss of each of the N pairs here, fp32 [N]: the mean of both directions and of all `dims`.

    The first N of the M keys are the queries' partners, the others hard negatives. `groups`: the group of each pair;
    pairs of one group, except "", are no negatives of each other. A collective call: every process makes it, with any
    N."""
    count = len(queries_ND)
    device = queries_ND.device
    # The type is given because PyTorch takes an empty list for floating-point numbers.
    owners = torch.tensor([crc32(n.encode()) + 1 if n else 0 for n in groups], dtype=torch.int64, device=device)
    all_queries, first = _gather(queries_ND.float(), group)
    all_keys, _ = _gather(keys_MD[:count].float(), group)
    negatives, _ = _gather(keys_MD[count:].float(), group)
    all_owners, _ = _gather(owners, group)
    places = torch.arange(first, first + count, device=device)
    same = (owners[:, None] == all_owners) & (owners[:, None] > 0)
    same[torch.arange(count), places] = False
    total = queries_ND.new_zeros(count, dtype=torch.float32)
    for dim in dims:
        queries, keys, others, far = (
            F.normalize(x[:, :dim], dim=-1) for x in (queries_ND.float(), all_keys, all_queries, negatives)
        )
        forward = (queries @ keys.T / temperature).masked_fill(same, float("-inf"))
        forward = torch.cat((forward, queries @ far.T / temperature), 1)
        mine = F.normalize(keys_MD[:count, :dim].float(), dim=-1)
        backward = (mine @ others.T / temperature).masked_fill(same, float("-inf"))
        total = total + F.cross_entropy(forward, places, reduction="none") / 2
        total = total + F.cross_entropy(backward, places, reduction="none") / 2
    return total / len(dims)


def _gather(x: Tensor, group: Group) -> tuple[Tensor, int]:
    """The rows of all processes, with gradients to each, and the index of this process's first row."""
    if group.world == 1:
        return x, 0
    from torch.distributed.nn.functional import all_gather

    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(group.world)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = [int(count) for count in counts]
    padded = torch.cat((x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])))
    parts = [torch.empty_like(padded) for _ in sizes]
    if x.is_floating_point():
        parts = all_gather(padded)
    else:  # which has no gradient
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[: group.rank])
