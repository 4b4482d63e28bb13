"""Quantizers: codes and vectors are one to one, gradients pass, no code dies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from openm6.model.quantize import FiniteScalars, VectorCodebook


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_code_is_a_combination_of_levels(levels: list[int], seed: int) -> None:
    quantizer = FiniteScalars(levels)
    assert quantizer.num_codes == math.prod(levels)
    x = 3 * torch.randn(200, len(levels), generator=torch.Generator().manual_seed(seed))
    made, codes, _ = quantizer(x)
    assert ((codes >= 0) & (codes < quantizer.num_codes)).all()
    torch.testing.assert_close(quantizer.vectors(codes), made)
    # By the definition: each dimension alone, against its own list of levels.
    for d, count in enumerate(levels):
        values = made[:, d] * (count // 2)
        assert ((values - values.round()).abs() < 1e-5).all()
        assert values.min() >= -(count // 2) - 1e-5
        assert values.max() <= (count - 1) // 2 + 1e-5
        order = x[:, d].argsort()
        assert (values[order].diff() >= -1e-5).all()  # a larger number has no lower level
    everything = quantizer.vectors(torch.arange(quantizer.num_codes))
    assert len(everything.unique(dim=0)) == quantizer.num_codes
    assert everything.abs().max() <= 1


def test_all_levels_are_reached_and_gradients_pass() -> None:
    quantizer = FiniteScalars([8, 5])
    x = torch.linspace(-4, 4, 401)[:, None].repeat(1, 2).requires_grad_()
    made, _, loss = quantizer(x)
    assert [len(made[:, d].unique()) for d in (0, 1)] == [8, 5]
    assert loss == 0
    made.sum().backward()
    assert x.grad is not None
    assert (x.grad[150:250] > 0.1).all()


def test_vectors_take_the_nearest_code() -> None:
    torch.manual_seed(0)
    codebook = VectorCodebook(7, 3).eval()
    codebook.codebook_KE.normal_()
    x = torch.randn(5, 4, 3, requires_grad=True)
    made, codes, loss = codebook(x)
    naive = [
        min(range(7), key=lambda k: float((v - codebook.codebook_KE[k]).square().sum()))
        for v in x.detach().view(-1, 3)
    ]  # fmt: skip
    assert codes.flatten().tolist() == naive
    torch.testing.assert_close(made, codebook.vectors(codes))
    assert float(loss) == pytest.approx(0.25 * float((x - made).square().mean()))
    made.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_a_codebook_finds_the_middles_of_what_it_sees_and_none_of_it_dies() -> None:
    torch.manual_seed(0)
    middles = 5 * torch.randn(16, 4)
    codebook = VectorCodebook(80, 4)
    for _ in range(400):
        codebook(middles[torch.randint(16, (512,))] + 0.1 * torch.randn(512, 4))
    codebook.eval()
    _, codes, loss = codebook(middles)
    assert float(loss) < 0.25 * 0.02
    assert len(codes.unique()) == 16
    _, codes, _ = codebook(middles[torch.randint(16, (4096,))] + 0.1 * torch.randn(4096, 4))
    assert len(codes.unique()) == 80


def test_codes_out_of_use_start_again_where_inputs_are() -> None:
    torch.manual_seed(0)
    codebook = VectorCodebook(8, 2)
    for _ in range(5):
        codebook(torch.randn(64, 2))
    for _ in range(400):
        codebook(torch.randn(64, 2) + 100)  # far from where all codes are
    _, codes, _ = codebook(torch.randn(512, 2) + 100)
    assert len(codes.unique()) >= 7
