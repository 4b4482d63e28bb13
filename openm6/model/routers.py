"""How a router chooses K of N experts for each token. A new way is a function here and an entry in ROUTERS."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def _largest(wanted_TN: Tensor, chosen: int) -> Tensor:
    return wanted_TN.topk(chosen, dim=-1).indices


def _best_of_each_group(wanted_TN: Tensor, chosen: int) -> Tensor:
    wanted_TKG = wanted_TN.unflatten(1, (chosen, -1))
    size = wanted_TKG.shape[-1]
    return wanted_TKG.argmax(-1) + torch.arange(0, size * chosen, size, device=wanted_TN.device)


class RouterKind(NamedTuple):
    """`choose` maps scores [T, N] and K to experts, int64 [T, K]. `has_groups`: K must divide N. `softmax_per_group`:
    each group has a softmax of its own, otherwise there is one over all experts."""

    choose: Callable[[Tensor, int], Tensor]
    has_groups: bool = False
    softmax_per_group: bool = False


ROUTERS = {
    "topk": RouterKind(_largest),  # GShard, Switch
    "prototype": RouterKind(_best_of_each_group, has_groups=True, softmax_per_group=True),  # M6-T, 3.3: "k top-1"
    "grouped": RouterKind(_best_of_each_group, has_groups=True),  # MoGE, arXiv 2505.21411
}
