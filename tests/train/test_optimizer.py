"""Optimizers that leave PyTorch's compiler alone are PyTorch's in all else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from openm6.train.optimizer import Adafactor, AdamW, Muon

KINDS = (AdamW, Muon, Adafactor)


def _with_gradient() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.full((4, 4), 0.5)
    return parameter


@pytest.mark.parametrize("kind", KINDS)
def test_step_hooks_profiles_and_schedulers_see_every_step(kind: type[Optimizer]) -> None:
    torch.optim.AdamW([_with_gradient()])  # which adds its hooks to PyTorch's own class
    optimizer = kind([_with_gradient()], lr=0.1)  # type: ignore[call-arg]
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    scheduler.step()
    assert seen == ["before", "after"] and optimizer.param_groups[0]["lr"] == 0.05
    names = {event.key for event in profile.key_averages()}
    assert names >= {f"Optimizer.{way}#{kind.__name__}.{way}" for way in ("step", "zero_grad")}


def test_adamw_steps_are_those_of_pytorch() -> None:
    ours, theirs = _with_gradient(), _with_gradient()
    for kind, parameter in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind([parameter], lr=0.1, weight_decay=0.1, fused=True)
        assert optimizer.step(lambda: 3.0) == 3.0 and torch.is_grad_enabled()
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_no_step_imports_the_compiler() -> None:
    code = (
        "import sys, torch; from openm6.train.optimizer import Adafactor, AdamW, Muon\n"
        "for kind in (AdamW, Muon, Adafactor):\n"
        "    parameter = torch.nn.Parameter(torch.ones(4, 4)); parameter.grad = torch.ones(4, 4)\n"
        "    optimizer = kind([parameter], lr=0.1); optimizer.step(); optimizer.zero_grad()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
