"""Weights in 8 and 4 bits: rounded as near as can be, found again as they were rounded, and so multiplied."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

from openm6.compress.convert import quantize_model
from openm6.core.batch import pad
from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.cpu.pack import pack_for_cpu
from openm6.model.cpu.packed import PackedInt4, PackedInt8, packed
from openm6.model.lowbit import GROUP, INT4, INT8, bits_of, restored, round4, round8, stored
from openm6.model.roles import Role
from tests.conftest import EXPERTS, drawing_session, example, tiny_model

INSIDE = "blocks.0.attention.qkv.weight"


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-6, 1.0, 1e4]), st.sampled_from([4, 8]))
def test_a_weight_is_rounded_to_the_nearest_and_found_again(seed: int, scale: float, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 2 * GROUP, generator=generator) * scale
    kept = stored(INSIDE, Role.MATRIX, weight, bits)
    found = restored(INSIDE, kept.__getitem__)
    parts = weight.unflatten(1, (-1, GROUP)) if bits == 4 else weight[:, None]
    step = (parts.amax(2) - parts.amin(2)) / 15 if bits == 4 else parts.abs().amax(2) / 127
    error = (found - weight).unflatten(1, (-1, parts.shape[2])).abs().amax(2)
    # Half a step, of a quotient up to 127 in fp32; the scales and middles of four bits are bf16 themselves.
    assert (error <= step * (0.5 + 127 * 2**-23 if bits == 8 else 0.6) + 1e-20).all()
    again = stored(INSIDE, Role.MATRIX, found, bits)
    torch.testing.assert_close(restored(INSIDE, again.__getitem__), found, rtol=1e-2 if bits == 4 else 1e-6, atol=0)


def test_what_is_rounded() -> None:
    kinds = {
        (Role.MATRIX, (48, 32)): (8, 4), (Role.EXPERT, (4, 32, 64)): (8, 4), (Role.EMBEDDING, (90, 32)): (8, 8),
        (Role.HEAD, (90, 32)): (8, 8), (Role.IMAGE_ENCODER, (8, 3, 4, 4)): (8, 8), (Role.MATRIX, (32, 20)): (8, 8),
        (Role.ROUTER, (4, 32)): (None, None), (Role.NORM, (32,)): (None, None),
        (Role.PATCH_POSITION, (16, 32)): (None, None),
    }  # fmt: skip
    for (role, shape), expected in kinds.items():
        assert (bits_of(role, shape, 8), bits_of(role, shape, 4)) == expected
        weight = torch.randn(shape)
        for bits in (4, 8):
            found = restored("x", stored("x", role, weight, bits).__getitem__)
            assert found.shape == weight.shape and (found - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_kernels_multiply_by_what_the_file_holds(rows: int, bias: bool) -> None:
    weight, x, shift = torch.randn(64, 96), torch.randn(2, rows, 96), torch.randn(64) if bias else None
    for dtype, kind, rounded, near in (
        (INT8, PackedInt8, round8, 0.02), (INT4, PackedInt4, round4, 0.01),
    ):  # fmt: skip
        product = packed(weight, shift, dtype)
        assert isinstance(product, kind)
        held = restored(INSIDE, stored(INSIDE, Role.MATRIX, weight, 8 if rounded is round8 else 4).__getitem__)
        expected = torch.nn.functional.linear(x.double(), held.double(), None if shift is None else shift.double())
        found = product(x).double()
        assert (found - expected).norm() < near * expected.norm()
        assert torch.equal(copy.deepcopy(product)(x), product(x))
    assert isinstance(packed(torch.randn(63, 96), None, INT4), PackedInt8)  # no shape for the kernel


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("changes", [{}, {"norm": "layer", "activation": "gelu", "positions": "learned"}, EXPERTS])
def test_a_network_in_few_bits_gives_nearly_what_it_gave(bits: int, changes: dict[str, object]) -> None:
    model = tiny_model(**changes, qk_norm=True)
    batch = pad([example(np.random.default_rng(n), 4, 6, ((2, 2),)) for n in range(3)], 0)
    with torch.inference_mode():
        expected = model(batch).hidden
        found = pack_for_cpu(copy.deepcopy(model), {4: INT4, 8: INT8}[bits])(batch).hidden.float()
    real = batch.segments > 0
    assert (found[real] - expected[real]).norm() < {8: 0.05, 4: 0.5}[bits] * expected[real].norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_directory_in_few_bits(bits: int, tmp_path: Path) -> None:
    session = drawing_session()
    session.save(tmp_path / "whole")
    quantize_model(tmp_path / "whole", tmp_path / "few", bits)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "few")]
    assert sizes[1] < sizes[0] / 2.5
    few = Session.load(tmp_path / "few")
    assert few.model.config.weight_bits == bits and isinstance(few.model.packed_head, PackedInt8)
    whole, prompt = Session.load(tmp_path / "whole"), "红色的杯子"
    vectors = [one.run("text_vector", text=prompt) for one in (whole, few)]
    assert vectors[0] @ vectors[1] > 0.95
    assert few.draw("text_to_image", caption=prompt, decoding={"passes": 2})[0].image.size == (16, 16)
    assert isinstance(few.run("text_continuation", text=prompt, decoding={"max_new_tokens": 4}), str)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    drawing_session().save(tmp_path / "whole")
    with pytest.raises(UsageError, match="weight_bits is 3; it can be 8, 4"):
        quantize_model(tmp_path / "whole", tmp_path / "few", 3)
    few = quantize_model(tmp_path / "whole", tmp_path / "few", 8)
    assert isinstance(few.model, M6)
    with pytest.raises(UsageError, match="quantized weights, which cannot be trained"):
        Session.load(tmp_path / "few", trainable=True)
    with pytest.raises(UsageError, match="quantized weights, which cannot be trained"):
        quantize_model(tmp_path / "few", tmp_path / "fewer", 4)
    weights = load_file(tmp_path / "few" / "model.safetensors")
    del weights["embed.weight.scale"]
    save_file(weights, tmp_path / "few" / "model.safetensors", {"format": "pt"})
    with pytest.raises(OpenM6Error, match="embed.weight.scale"):
        Session.load(tmp_path / "few")
