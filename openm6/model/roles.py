"""The role of each parameter: what optimizers, plans, pruning, quantization and adapters ask instead of its name."""

from __future__ import annotations

from enum import StrEnum

from torch import nn


class Role(StrEnum):
    """A vector beside a matrix (a bias) has the role of its matrix; the number of dimensions tells them apart."""

    EMBEDDING = "embedding"  # rows that are looked up: tokens, learned positions, vectors of a prompt
    PATCH_POSITION = "patch position"  # rows and columns of an image's patches
    IMAGE_ENCODER = "image encoder"
    MATRIX = "matrix"  # attention and dense feed-forward, the convolutions of an image codec
    ROUTER = "router"
    EXPERT = "expert"
    NORM = "norm"
    HEAD = "head"  # output matrix and task heads
    ADAPTER_INPUT = "adapter input"  # the first of the two products of LoRA and of a bottleneck
    SCALE = "scale"  # factors of IA3


_NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
_PEFT = {"lora_A": Role.ADAPTER_INPUT, "ia3_l": Role.SCALE}
"""Attributes of PEFT's modules that have a role of their own."""


def role_of(network: nn.Module, name: str) -> Role:
    """The role of the parameter or buffer `name` of a network.

    A module class names the roles of its attributes in `roles`; everything inside an attribute inherits its role.
    """
    role, module = Role.MATRIX, network
    for attribute in name.split("."):
        role = _PEFT.get(attribute) or getattr(module, "roles", {}).get(attribute, role)
        module = getattr(module, attribute, None)  # type: ignore[assignment]
        if isinstance(module, _NORMS):
            role = Role.NORM
    return role
