"""The network without the kernels written for CPUs gives what it gives with them, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.core.batch import Batch, pack, pad
from openm6.model import cpu
from openm6.model.cache import fill, prefill, step
from openm6.model.m6 import M6
from tests.conftest import EXPERTS, YARN, example, tiny_model

CASES = [
    {"num_key_value_heads": 2, "qk_norm": True},
    {"norm": "layer", "activation": "gelu", "positions": "learned"},
    {**EXPERTS, "router": "prototype", "auxiliary_loss": 0.1},
    {"num_key_value_heads": 2, "qkv_bias": True, "rotary_scaling": YARN},
]


@pytest.mark.parametrize("changes", CASES)
def test_training_needs_no_kernel(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    batch = pack([example(rng, 40 + n, 30 + n, ((2, 2),)) for n in range(6)], 160, 0)
    model = tiny_model(**changes).train()
    with_kernels, without = _gradients(model, batch), None
    monkeypatch.setattr(cpu, "enabled", False)
    without = _gradients(model, batch)
    assert with_kernels.keys() == without.keys()
    for name, gradient in with_kernels.items():
        torch.testing.assert_close(without[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def _gradients(model: M6, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", CASES)
@torch.inference_mode()
def test_decoding_needs_no_kernel(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    batch = pad([example(rng, 9 + 3 * n, 4) for n in range(3)], 0)
    model, found = tiny_model(**changes).eval(), []
    for enabled in (True, False):
        monkeypatch.setattr(cpu, "enabled", enabled)
        hidden, cache = prefill(model, batch, 40)
        after = [step(model, torch.tensor([3, 4, 5]), cache, reproducible=True) for _ in range(2)]
        found.append(torch.stack([hidden, *after, fill(model, torch.full((3, 4), 7), cache, 4)[:, -1]]))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
