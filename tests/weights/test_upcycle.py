"""A dense network and its upcycled form give the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.core.batch import pack
from openm6.core.errors import UsageError
from openm6.weights.upcycle import upcycle
from tests.conftest import EXPERTS, example, tiny_model


@pytest.mark.parametrize(("router", "chosen", "interval"), [("topk", 2, 1), ("prototype", 4, 2), ("grouped", 2, 1)])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_function_is_preserved(router: str, chosen: int, interval: int, activation: str) -> None:
    rng = np.random.default_rng(0)
    batch = pack([example(rng, 4, 6, ((2, 2),)), example(rng, 2, 9)], 32, 0)
    dense = tiny_model(num_hidden_layers=3, activation=activation)
    sparse = upcycle(dense, 8, chosen, router, interval).eval()
    assert sparse.config.expert_layers() == ([0, 1, 2] if interval == 1 else [1])
    with torch.no_grad():
        found, expected = sparse(batch).hidden, dense(batch).hidden
    real = batch.segments > 0
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_experts_part_in_training() -> None:
    rng = np.random.default_rng(0)
    batch = pack([example(rng, 4, 12) for _ in range(8)], 64, 0)
    sparse = upcycle(tiny_model(), 4).train()
    sparse(batch).loss.backward()
    up, router = sparse.blocks[0].feed_forward.experts.up, sparse.blocks[0].feed_forward.router
    assert not torch.allclose(up.grad[0], up.grad[1])
    assert router.weight.grad.abs().max() < 1e-6, "equal experts: at the first step no choice is better than another"
    with torch.no_grad():
        up -= 0.1 * up.grad
    sparse.zero_grad()
    sparse(batch).loss.backward()
    assert router.weight.grad.abs().max() > 1e-4


def test_what_cannot_be_upcycled_is_refused() -> None:
    with pytest.raises(UsageError, match="has 4 experts already"):
        upcycle(tiny_model(**EXPERTS), 4)
    with pytest.raises(UsageError, match="have biases"):
        upcycle(tiny_model(norm="layer"), 4)
    with pytest.raises(UsageError, match="experts_per_token 2 or more"):
        upcycle(tiny_model(), 4, 1)
    with pytest.raises(UsageError, match="has to be a multiple"):
        upcycle(tiny_model(), 5, 2, "prototype")
