"""A head, a loss and a metric of one's own: how near is the thing that a phrase points at?

    openm6 --extension examples/depth_head.py train depth.yaml
    openm6 --extension examples/depth_head.py eval runs/depth/model --task examples/depth.yaml --data scenes/test

Of two things alike the larger one is nearer, so the scenes' boxes tell an order, not distances. Hence the loss: of
every two examples of a step the nearer one has to get the higher number (RankNet, Burges et al. 2005).
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.tasks.extend import Values, register_head, register_metric
from openm6.tasks.slots.box import as_box


def nearness(value: Any) -> float:
    """Of a box: its area."""
    left, top, right, bottom = as_box(value)
    return (right - left) * (bottom - top)


class Depth:
    outputs = 1

    def schema(self) -> dict[str, Any]:
        return {"type": "number"}

    def numbers(self, value: Any) -> list[float]:
        return [nearness(value)]

    def loss(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        order = torch.sign(wanted - wanted.T)
        return (F.softplus(-order * (outputs - outputs.T)) * order.abs()).sum(1) / max(1, len(outputs) - 1)

    def read(self, outputs: list[float]) -> float:
        return outputs[0]


def ordered(answers: list[str], references: list[list[str]]) -> Values:
    """Share of the neighbouring records whose order is right."""
    said, true = [float(a) for a in answers], [nearness(json.loads(r[0])) for r in references]
    return Values.mean([float((said[i] > said[i - 1]) == (true[i] > true[i - 1])) for i in range(len(said))])


register_head("depth", Depth())
register_metric("ordered", ordered)
