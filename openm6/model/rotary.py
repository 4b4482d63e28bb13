"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.4.2), and their scaling to longer texts.

`rotary_scaling` of the configuration has the keys of transformers' `rope_parameters` (without `rope_theta`):

    llama3    Llama 3.1: frequencies whose wavelength is longer than original_max_position_embeddings /
              low_freq_factor are divided by `factor`, those shorter than original / high_freq_factor stay, those
              between are interpolated
    yarn      YaRN (arXiv 2309.00071, section 3.2): the same by the number of turns within the original length, from
              `beta_fast` (32) down to `beta_slow` (1); cosine and sine are multiplied by `attention_factor`, by default
              0.1 ln(factor) + 1 (section 3.3)

The formulas are transformers' (modeling_rope_utils.py), so that angles are equal bit by bit on one device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openm6.model.config import ModelConfig

Rope = tuple[Tensor, Tensor]
"""cos and signed sin of rotary positions (`rotary_angles`)."""


def rotary_angles(config: ModelConfig, positions_BT: Tensor, dtype: torch.dtype) -> Rope | None:
    """cos and signed sin of the rotary positions, each [B, T, 1, E]; None where the positions are not rotary.

    The pairs are (i, i + E/2); the sine of a pair's first half is negative, so that turning is two products
    and a roll (see `rotate`). Taken in fp32, then brought to the precision in which they are used.
    """
    if config.positions != "rotary":
        return None
    frequency, factor = _frequencies(config, positions_BT.device)
    angle = (positions_BT[..., None].float() * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x_BTHE: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs (i, i + E/2) of each head by the angle of their position."""
    cos, sin = rope
    return torch.addcmul(x_BTHE * cos, x_BTHE.roll(x_BTHE.shape[-1] // 2, dims=-1), sin)


def llama3_factors(width: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """By what the scaling `llama3` divides the frequencies of a head of `width`, fp32 [E / 2]."""
    frequency = 1.0 / _period(width, theta, torch.device("cpu"))
    return frequency / _llama3(frequency, scaling)


def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angles per position, fp32 [E / 2], and the factor of cosine and sine."""
    period = _period(config.head_dim, config.rope_theta, device)
    scaling = config.rotary_scaling or {}
    match scaling.get("rope_type"):
        case "llama3":
            return _llama3(1.0 / period, scaling), 1.0
        case "yarn":
            return _yarn(period, config.rope_theta, scaling), _attention_factor(scaling)
    return 1.0 / period, 1.0


def _period(width: int, theta: float, device: torch.device) -> Tensor:
    exponent: Tensor = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return theta**exponent


def _llama3(frequency: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    scaled = torch.where(wavelength > original / low, frequency / factor, between)
    return torch.where(wavelength < original / high, frequency, scaled)


def _yarn(period: Tensor, theta: float, scaling: dict[str, Any]) -> Tensor:
    half, original = len(period), scaling["original_max_position_embeddings"]

    def place(turns: float) -> float:
        """The pair that makes so many turns within the original length."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = place(scaling.get("beta_fast", 32)), place(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    pairs = torch.arange(half, device=period.device, dtype=torch.float32)
    kept = 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * period) * (1 - kept) + 1.0 / period * kept


def _attention_factor(scaling: dict[str, Any]) -> float:
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor, one, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _growth(factor, one) / _growth(factor, all_dim) if one and all_dim else _growth(factor)


def _growth(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
