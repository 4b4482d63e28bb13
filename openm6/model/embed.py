"""Pictures in: from pixels to positions of the sequence, with a 2-D place for every patch.

Three ways (M6, KDD 2021, section 4.1 takes features of a ResNet or of patches): `patch`, one linear
projection of each patch; `stem`, a small residual convolution network; `resnet`, transformers' ResNet.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.batch import Images
from openm6.model.config import ModelConfig
from openm6.model.roles import Role

MAX_SIDE = 128
"""Rows or columns of patches with a learned place of their own; longer pictures are interpolated."""


class ImageEmbedder(nn.Module):
    """Pictures of one size, uint8 [N, H, W, 3], to patch features [N * h * w, D], row by row."""

    roles: ClassVar[dict[str, Role]] = {"row": Role.PATCH_POSITION, "column": Role.PATCH_POSITION}

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.hidden_size
        self.stride = config.image_stride
        self.features: nn.Module
        self.project: nn.Module = nn.Identity()
        if config.image_embedder == "patch":
            self.features = nn.Conv2d(3, d, config.image_patch, config.image_patch)
            self.features.enters_stream = True  # type: ignore[assignment]  # for the initialization
        elif config.image_embedder == "stem":
            assert config.stem_widths
            widths = config.stem_widths
            self.features = residual_stages(nn.Conv2d(3, widths[0], 4, 2, padding=1), widths)  # stride 2^len(widths)
            self.project = _into_stream(config.stem_widths[-1], d)
        else:
            self.features = FrozenNormResNet(config.resnet)
            self.project = _into_stream(self.features.width, d)
        side = min(MAX_SIDE, config.image_max_patches)
        self.row, self.column = (nn.Parameter(torch.zeros(side, d)) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        # For answers each picture is read by itself on a CPU: of several at once the kernels add up in another order,
        # and what is drawn from logits that differ in the last bit is another answer.
        alone = not torch.is_grad_enabled() and not pixels.is_cuda
        return torch.cat([self._read(part) for part in pixels.split(1)]) if alone else self._read(pixels)

    def _read(self, pixels: Tensor) -> Tensor:
        # uint8 [N, H, W, 3] seen as [N, 3, H, W] is channels-last already: what the convolutions like best.
        x = pixels.permute(0, 3, 1, 2).to(self.row.dtype) / 127.5 - 1.0
        x_NDhw = self.features(x)
        rows, columns = x_NDhw.shape[-2:]
        x_NhwD = self.project(x_NDhw.permute(0, 2, 3, 1))
        place = _places(self.row, rows)[:, None] + _places(self.column, columns)
        return (x_NhwD + place).flatten(0, 2)


def _into_stream(width: int, hidden_size: int) -> nn.Module:
    """Convolution features brought to the scale of token embeddings: at their own, several times larger, the blocks'
    updates would hardly change a picture's positions."""
    project = nn.Linear(width, hidden_size)
    project.enters_stream = True  # type: ignore[assignment]  # for the initialization
    return nn.Sequential(nn.LayerNorm(width), project)


def cell_features(cells: Tensor, width: int, scale: float) -> Tensor:
    """Sinusoids of the rows and columns of a drawn picture's codes, [..., 2] to [..., width] of root mean square
    `scale`, with periods from 4 to 512; 0 where a cell is -1.

    Rotary positions count codes in a line: where a code stands has to be told to one that is masked as its neighbours.
    """
    quarter = width // 4
    periods = 4 * 128 ** (torch.arange(quarter, device=cells.device) / quarter)
    angles = cells[..., None] * (2 * math.pi / periods)
    waves = torch.cat((angles.sin(), angles.cos()), -1).flatten(-2) * (scale * math.sqrt(2))
    return F.pad(waves, (0, width - 4 * quarter)).masked_fill(cells[..., :1] < 0, 0.0)


def _places(table: Tensor, count: int) -> Tensor:
    """The first `count` places, or, beyond the table, the table stretched: [count, D]."""
    if count <= len(table):
        return table[:count]
    return F.interpolate(table.T[None], count, mode="linear", align_corners=True)[0].T


def residual_stages(first: nn.Conv2d, widths: list[int]) -> nn.Sequential:
    """[B, 3, H, W] to [B, widths[-1], h, w]: the convolution `first` and a residual block, then for each further width
    a 2 x 2 convolution of stride 2 and a residual block. Group norms: an image's features do not depend on the others
    in the batch."""
    layers: list[nn.Module] = [first, Residual(widths[0])]
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 2, 2), Residual(after)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x)))))), 3 x 3, as in pre-activation ResNets (He et al. 2016)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.gelu(self.norm1(x)))
        return x + self.conv2(F.gelu(self.norm2(y)))


class FrozenNormResNet(nn.Module):
    """transformers' ResNet, last stage, stride 32.

    Its batch norms always use their stored statistics: batch statistics would let one example's features
    depend on the pictures that happen to share its batch.
    """

    def __init__(self, sizes: dict | None):
        super().__init__()
        from transformers import ResNetBackbone, ResNetConfig

        config = ResNetConfig(**{**(sizes or {}), "out_features": None, "out_indices": [-1]})
        self.backbone = ResNetBackbone(config)
        self.width: int = config.hidden_sizes[-1]  # type: ignore[index]

    def train(self, mode: bool = True) -> FrozenNormResNet:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).feature_maps[0]


def scatter_images(x_BTD: Tensor, images: list[Images], embedder: ImageEmbedder, training: bool) -> Tensor:
    """The token embeddings with the patch positions replaced by the patches' features."""
    flat = x_BTD.flatten(0, 1)
    for group in images:
        read = group.pixels.is_floating_point()  # elsewhere, by an embedder of the same weights
        features = group.pixels.flatten(0, 2) if read else embedder(group.pixels)
        flat = flat.index_copy(0, group.places, features.to(flat.dtype))
    if training and all(group.pixels.is_floating_point() for group in images):
        # Every parameter takes part in every step: data-parallel reduction waits for all gradients.
        side = 2 * embedder.stride  # a norm needs more than one value
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=flat.device)
        flat = flat + 0.0 * embedder(blank).sum()
    return flat.view_as(x_BTD)
