"""Linear layers with adapters beside them, and learned positions before an example.

A base can carry several adapters; `Active` selects one for the whole network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model.cpu.packed import with_least_rows
from openm6.model.roles import Role

ONLY = "default"
"""The name of a single adapter."""


@dataclass(slots=True)
class Active:
    """The name of the active adapter; None: the base alone."""

    name: str | None = ONLY


class Low(nn.Module):
    """LoRA (arXiv 2106.09685): B A x times a scale beside the product; A [rank, in], B [out, rank]."""

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b * scale)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        y = base(x)
        low = with_least_rows(lambda x: F.linear(F.linear(x, self.a), self.b), x.to(self.a.dtype))
        return y + low.to(y.dtype)


class Scaled(nn.Module):
    """IA3 (arXiv 2205.05638): outputs, or inputs, times a learned vector."""

    def __init__(self, scale: Tensor, inputs: bool):
        super().__init__()
        self.scale, self.inputs = nn.Parameter(scale.flatten()), inputs

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        if self.inputs:
            return base(x * self.scale.to(x.dtype))
        y = base(x)
        return y * self.scale.to(y.dtype)


class Bottleneck(nn.Module):
    """Houlsby et al. 2019 (arXiv 1902.00751): a narrow network after the product, added to what it gave."""

    roles: ClassVar[dict[str, Role]] = {"down": Role.ADAPTER_INPUT}

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        y = base(x)
        narrow = with_least_rows(lambda y: self.up(F.relu(self.down(y))), y.to(self.down.weight.dtype))
        return y + narrow.to(y.dtype)


class _WithChanges(nn.Module):
    """A layer, and its changes by adapters, by name."""

    def __init__(self, base: nn.Module, active: Active):
        super().__init__()
        self.base_layer, self.active = base, active
        self.changes = nn.ModuleDict()

    @property
    def change(self) -> Any:
        """The change by the active adapter; None where it has none here, or no adapter is active."""
        name = self.active.name
        return self.changes[name] if name is not None and name in self.changes else None


class Changed(_WithChanges):
    """A linear layer with adapters."""

    def forward(self, x: Tensor) -> Tensor:
        change = self.change
        y: Tensor = self.base_layer(x) if change is None else change(x, self.base_layer)
        return y


class Rows(nn.Module):
    """Rows of a matrix, weight [R, D], that take the place of its rows `ids`; `place` [V] says where each row's is, -1
    where it stays."""

    ids: Tensor
    place: Tensor

    def __init__(self, ids: list[int], weight: Tensor, size: int):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("ids", torch.tensor(ids))
        self.register_buffer("place", torch.full((size,), -1).index_copy(0, self.ids, torch.arange(len(ids))))


class ChangedRows(_WithChanges):
    """An embedding or an output matrix with rows replaced by adapters (Rows)."""

    @property
    def weight(self) -> Tensor:
        """The matrix without changes, [V, D]."""
        return self.base_layer.get_parameter("weight")

    def changed(self) -> Tensor:
        """The matrix with the rows of the active adapter."""
        rows = self.change
        return self.weight if rows is None else self.weight.index_copy(0, rows.ids, rows.weight.to(self.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.base_layer(ids)
        if (rows := self.change) is None:
            return x
        place = rows.place[ids]
        return torch.where((place >= 0)[..., None], rows.weight[place.clamp(min=0)].to(x.dtype), x)

    def logits(self, base: Tensor, hidden: Tensor) -> Tensor:
        """The logits `base` of the unchanged matrix for `hidden`, with those of the active adapter's rows replaced."""
        if (rows := self.change) is None:
            return base
        own = with_least_rows(lambda x: F.linear(x, rows.weight), hidden.to(rows.weight.dtype))
        return base.index_copy(-1, rows.ids, own.to(base.dtype))


class Prompt(nn.Module):
    """Vectors of their own for the first `length` positions of every example: before the first layer (prompt tuning,
    arXiv 2104.08691), or before each (prefix tuning in the form of P-tuning v2, arXiv 2110.07602).

    weight [layers, length, D]
    """

    def __init__(self, layers: int, length: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, length, width))

    def forward(self, layer: int, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        if layer >= len(self.weight):
            return x_BTD
        length = self.weight.shape[1]
        own = self.weight[layer][positions_BT.clamp(max=length - 1)].to(x_BTD.dtype)
        return torch.where((positions_BT < length)[..., None], own, x_BTD)
