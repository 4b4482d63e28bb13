"""RMSNorm against PyTorch's, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from openm6.model.norm import RMSNorm, rms_norm


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.floats(1e-8, 1e-2), st.floats(1e-3, 30))
def test_values_and_gradients_are_those_of_pytorch(rows: int, heads: int, width: int, eps: float, size: float) -> None:
    torch.manual_seed(rows * width)
    x = (torch.randn(rows, heads, width, dtype=torch.float64) * size).requires_grad_()
    weight = torch.randn(heads, width, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(rows, heads, width, dtype=torch.float64)
    expected = F.rms_norm(x, (width,), eps=eps) * weight
    found = rms_norm(x, weight, eps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), d_out) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, eps), expected, rtol=1e-9, atol=1e-12)


def test_zeros_stay_zeros_and_have_a_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8, eps=1e-6)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize(("weight", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_the_wider_precision_comes_out(weight: torch.dtype, expected: torch.dtype) -> None:
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    y = rms_norm(x, torch.ones(16, dtype=weight), 1e-6)
    assert y.dtype == expected
    torch.testing.assert_close(y.float(), F.rms_norm(x.float(), (16,), eps=1e-6), rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
