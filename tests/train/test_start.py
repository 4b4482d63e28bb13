"""Initial weights: by the network's rule, and the same numbers for any part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from openm6.model import M6
from openm6.model.files import meta_model, save_network
from openm6.train import start
from openm6.train.start import start_at_random, start_from
from tests.conftest import tiny_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_experts": 4,
    "bias_update": 1e-3,
    "tie_word_embeddings": False,
}


def empty(**sizes: object) -> M6:
    return meta_model(tiny_config(**{**SIZES, **sizes})).to_empty(device="cpu")


@pytest.mark.parametrize("embedder", ["patch", "stem", "resnet"])
def test_weights_spread_as_those_that_the_network_makes_itself(embedder: str) -> None:
    model = empty(image_embedder=embedder)
    start_at_random(model, 0)
    torch.manual_seed(0)
    wanted = M6(model.config)
    for (name, made), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        if float(other.detach().std()) == 0:
            torch.testing.assert_close(made, other, msg=name)
        else:
            spread = 5 / (2 * made.numel()) ** 0.5  # five standard errors
            assert float(made.detach().std()) == pytest.approx(float(other.detach().std()), rel=2 * spread), name
            assert abs(float(made.detach().mean())) < 5 * float(other.detach().std()) / made.numel() ** 0.5, name
    for (name, buffer), other in zip(model.named_buffers(), wanted.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_no_two_tensors_and_no_two_seeds_have_the_same_numbers() -> None:
    one, other, again = empty(), empty(), empty()
    start_at_random(one, 0)
    start_at_random(other, 1)
    start_at_random(again, 0)
    found = [p.detach().flatten()[:8] for p in one.parameters() if p.detach().std() > 0]
    found += [p.detach().flatten()[:8] for p in other.parameters() if p.detach().std() > 0]
    shapes = {tuple((f / f.abs().max()).tolist()) for f in found}
    assert len(shapes) == len(found)
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 60), st.data())
def test_any_rows_are_those_of_the_whole(rows: int, width: int, block: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    shape = torch.Size((rows, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "BLOCK", block)
        whole, part = torch.zeros(shape), torch.zeros(last - first, width)
        start._draw(whole, 0, rows, shape, "key", 0.0, 1.0)
        start._draw(part, first, last, shape, "key", 0.0, 1.0)
    assert torch.equal(part, whole[first:last])
    assert whole.all()


def test_codes_whose_vectors_are_near_start_alike() -> None:
    """Products of two rows are those of a Gaussian kernel on the vectors; other rows are left alone."""
    vectors = torch.randn(30, 4)
    weight = torch.full((50, 4096), 7.0)
    start.start_codes(weight, 10, vectors, 0, 0.5)
    assert (weight[:10] == 7).all() and (weight[40:] == 7).all()
    rows = weight[10:40]
    apart = torch.cdist(vectors / vectors.std(0), vectors / vectors.std(0))
    torch.testing.assert_close(rows @ rows.T / (4096 * 0.25), torch.exp(-(apart**2) / 2), atol=0.08, rtol=0)
    again, other = torch.zeros(50, 4096), torch.zeros(50, 4096)
    start.start_codes(again, 10, vectors, 0, 0.5)
    start.start_codes(other, 10, vectors, 1, 0.5)
    assert torch.equal(again[10:40], rows) and not torch.equal(other[10:40], rows)


def test_stored_weights_are_read(tmp_path: Path) -> None:
    saved = M6(tiny_config(**SIZES))
    save_network(saved, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    model = empty()
    start_from(model, tmp_path, 0)
    for (name, tensor), other in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
