"""Scaled rotary positions, against transformers' formulas (modeling_rope_utils.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openm6.core.errors import UsageError
from openm6.model.rotary import rotary_angles
from tests.conftest import LLAMA3, YARN, tiny_config

_original = st.integers(16, 40_000)
_factor = st.floats(1, 64)
LLAMA3S = st.fixed_dictionaries({
    "rope_type": st.just("llama3"), "factor": _factor, "original_max_position_embeddings": _original,
    "low_freq_factor": st.floats(0.5, 2), "high_freq_factor": st.floats(2.5, 32),
})  # fmt: skip
YARNS = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": _factor, "original_max_position_embeddings": _original},
    optional={
        "attention_factor": st.floats(0.5, 2), "beta_fast": st.floats(8, 64), "beta_slow": st.floats(0.5, 4),
        "mscale": st.floats(0.5, 2), "mscale_all_dim": st.floats(0.5, 2), "truncate": st.booleans(),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.none(), LLAMA3S, YARNS), st.sampled_from([16, 64, 128]), st.floats(500, 1e7))
def test_angles_are_those_of_transformers(scaling: dict[str, Any] | None, width: int, theta: float) -> None:
    config = tiny_config(head_dim=width, rope_theta=theta, rotary_scaling=scaling)
    positions = torch.tensor([[0, 1, 7, 4095, 120_000]])
    cos, sin = rotary_angles(config, positions, torch.float32)
    if scaling:
        theirs = LlamaConfig(head_dim=width, rope_parameters={**scaling, "rope_theta": theta})
        frequency, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    else:
        frequency, factor = 1.0 / theta ** (torch.arange(0, width, 2).float() / width), 1.0
    angle = positions[..., None].float() * frequency
    half = width // 2
    for found, expected in ((cos, angle.cos()), (sin, angle.sin())):
        torch.testing.assert_close(found[:, :, 0, half:], expected * factor, atol=1e-6, rtol=1e-6)
    assert torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], -sin[..., half:])


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope_type is 'linear'; it can be llama3, yarn, or no scaling"),
        ({"rope_type": "yarn", "factor": 2.0}, "has no original_max_position_embeddings, which yarn needs"),
        ({**YARN, "low_freq_factor": 1.0}, "has no key low_freq_factor"),
        ({**YARN, "factor": "4"}, "factor is '4'; give a number above 0"),
        ({**YARN, "beta_fast": 0}, "beta_fast is 0; give a number above 0"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor has to be above low_freq_factor"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused_by_its_key(scaling: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=rf"model\.rotary_scaling.*{reason}"):
        tiny_config(rotary_scaling=scaling)


def test_learned_positions_are_not_scaled() -> None:
    with pytest.raises(UsageError, match='needs rotary positions; model.positions is "learned"'):
        tiny_config(positions="learned", rotary_scaling=YARN)
