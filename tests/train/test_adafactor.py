"""Adafactor against PyTorch's."""

from __future__ import annotations

import torch
from torch import nn

from openm6.train.optimizer import Adafactor


def test_steps_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    start = [
        torch.randn(12, 7),
        torch.randn(3, 5, 9),
        torch.randn(11),
        torch.randn(6, 2, 3, 3),
        1e-5 * torch.randn(4, 4),
    ]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    pair = Adafactor(ours, lr=0.03, weight_decay=0.1), torch.optim.Adafactor(theirs, lr=0.03, weight_decay=0.1)
    for _ in range(40):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_its_state_is_small() -> None:
    parameter = nn.Parameter(torch.randn(100, 200))
    parameter.grad = torch.randn(100, 200)
    optimizer = Adafactor([parameter])
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[parameter].values()) == 100 + 200 + 1
