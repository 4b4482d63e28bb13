"""Weight-only quantization to 8 or 4 bits: rounding, and the form in a file.

    8    a scale a row, symmetric: q = round(w / s), s = max|w| / 127
    4    a scale and a middle a group of GROUP columns: w = (q - 8) s + m, q in 0 to 15, for the products inside the
         blocks; all else in 8 bits

In a file, `NAME` is int8 [N, K], or uint8 [N, K / 2] with two numbers a byte, the first in the low half, and beside it
`NAME.scale` fp32 [N], or `NAME.scales` bf16 [K / GROUP, N, 2], scales and middles. Vectors, routers and whatever is
small stay as they are. Read again, a weight has the values that it was rounded to, and rounding those gives the same
numbers once more: what a kernel (cpu/packed.py) makes of them is what the file holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openm6.model.config import ModelConfig
from openm6.model.roles import Role

INT8, INT4 = torch.int8, torch.int4  # type: ignore[attr-defined]  # the names of kernels
GROUP = 32
SCALE, SCALES = ".scale", ".scales"


def bits_of(role: Role, shape: tuple[int, ...], bits: int) -> int | None:
    """Number of bits in which a tensor is stored; None: as it is."""
    if len(shape) < 2 or shape[0] < 2 or role in (Role.ROUTER, Role.PATCH_POSITION):
        return None
    return 4 if bits == 4 and role in (Role.MATRIX, Role.EXPERT) and fits4(shape) else 8


def fits4(shape: tuple[int, ...]) -> bool:
    """True where there is an int4 kernel for [..., N, K]."""
    return shape[-1] % GROUP == 0 and shape[-2] % 16 == 0


def round8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, ...] to int8 of that shape, and fp32 [N]."""
    flat = weight.detach().float().flatten(1)
    scale = (flat.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (flat / scale[:, None]).round().to(torch.int8).view(weight.shape), scale


def round4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] to 0 to 15, int32 [N, K], and scales and middles, bf16 [K / GROUP, N, 2]."""
    grouped = weight.detach().float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-30).bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    numbers = ((grouped - middle) / scale + 8).round().clamp(0, 15).to(torch.int32)
    return numbers.flatten(1), torch.cat((scale, middle), 2).transpose(0, 1).contiguous().bfloat16()


def stored(name: str, role: Role, weight: Tensor, bits: int) -> dict[str, Tensor]:
    """The tensors of a file for one of a network."""
    kept = bits_of(role, tuple(weight.shape), bits)
    if kept is None:
        return {name: weight.detach().contiguous()}
    if kept == 8:
        rows = weight.flatten(0, 1) if weight.ndim == 3 else weight  # experts: each row of each has a scale
        numbers, scale = round8(rows)
        return {name: numbers.view(weight.shape), name + SCALE: scale}
    numbers, scales = round4(weight.flatten(0, -2))
    pairs = numbers.to(torch.uint8).view(*weight.shape[:-1], -1, 2)
    return {name: (pairs[..., 0] | pairs[..., 1] << 4).contiguous(), name + SCALES: scales}


def shape_of(kept: list[int], dtype: str) -> tuple[int, ...]:
    """The shape of a tensor by its entry in a file (a dtype as safetensors names it)."""
    return (*kept[:-1], 2 * kept[-1]) if dtype == "U8" else tuple(kept)


def is_scale(name: str) -> bool:
    return name.endswith((SCALE, SCALES))


def restored(name: str, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of a file, by a function that reads one of them; fp32 where it was rounded."""
    kept = read(name)
    if kept.dtype == torch.int8:
        scale = read(name + SCALE)
        return (kept.reshape(len(scale), -1).float() * scale[:, None]).view(kept.shape)
    if kept.dtype != torch.uint8:
        return kept
    numbers = torch.stack((kept & 15, kept >> 4), -1).flatten(-2)
    scale, middle = read(name + SCALES).float().transpose(0, 1).unsqueeze(-1).unbind(2)  # [N, K / GROUP, 1] each
    grouped = numbers.flatten(0, -2).unflatten(1, (-1, GROUP)).float()
    return ((grouped - 8) * scale + middle).view(numbers.shape)


def kernel_of(config: ModelConfig) -> torch.dtype | None:
    """The kernels for a network with quantized weights."""
    return {8: INT8, 4: INT4}[config.weight_bits] if config.weight_bits else None
