"""The image codec: images to a grid of codes and back, the first stage of image generation (VQGAN, Esser et al. 2021).

encoder   squares of a few pixels to channels, then a halving for each further width, a residual block after each
middle    a quantizer (model/quantize.py)
decoder   the same upside down: each doubling is a convolution to 4 x the channels, laid out as 2 x 2 pixels
critic    optional: tells real patches from reconstructed ones (PatchGAN, Isola et al. 2017)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import register_dataclass

from openm6.core.errors import UsageError
from openm6.model.embed import Residual, residual_stages
from openm6.model.network import Network, NetworkConfig
from openm6.model.quantize import FiniteScalars, VectorCodebook


@dataclass
class CodecConfig(NetworkConfig):
    """The sizes of a codec, and the terms of its loss.

    image_size     pixels of a side
    patch          pixels of a side that the first convolution takes together
    widths         channels after it and after each halving; a code stands for a square of patch * 2^(len(widths) - 1)
    depth          residual blocks of the decoder at each size
    quantizer      `fsq` with `levels` (num_codes is their product), or `vq` with `num_codes` vectors of `code_dims`
    feature_loss   weight of the distance between the features of an image and of its reconstruction, by the codec's own
                   encoder or the image encoder of a trained model (`Codec.look_with`)
    critic_loss    weight of the adversarial loss; 0: no critic
    """

    model_type: ClassVar[str] = "openm6-codec"

    image_size: int = 64
    patch: int = 4
    widths: list[int] = None  # type: ignore[assignment]  # [48, 96]
    depth: int = 1
    quantizer: str = "fsq"
    levels: list[int] = None  # type: ignore[assignment]  # [8, 5, 5, 5]
    num_codes: int = None  # type: ignore[assignment]  # 1,024 for vq
    code_dims: int = 32
    feature_loss: float = 0.1
    critic_loss: float = 0.0

    def __post_init__(self) -> None:
        self.widths, self.levels = self.widths or [48, 96], self.levels or [8, 5, 5, 5]
        if self.quantizer not in ("fsq", "vq"):
            raise UsageError(f'codec.quantizer is "{self.quantizer}"; it can be fsq or vq.')
        self.num_codes = math.prod(self.levels) if self.quantizer == "fsq" else self.num_codes or 1024
        if self.image_size % self.stride:
            raise UsageError(
                f"codec.image_size is {self.image_size}; with patch {self.patch} and {len(self.widths)} widths it "
                f"has to be a multiple of {self.stride}."
            )
        if any(width % 8 for width in self.widths):
            raise UsageError(f"codec.widths are {self.widths}; each has to be a multiple of 8.")

    @property
    def stride(self) -> int:
        """Pixels of the side of a code."""
        return int(self.patch * 2 ** (len(self.widths) - 1))

    @property
    def side(self) -> int:
        """Codes of the side of an image."""
        return self.image_size // self.stride


@dataclass
class Reconstruction:
    """loss fp32 [], a sum over the pictures; losses fp32 [B], each picture's own part of it, without gradient; pixels
    fp32 [B, 3, H, W], -1 to 1 but for errors; codes int64 [B, h, w]."""

    loss: Tensor | None = None
    losses: Tensor | None = None
    pixels: Tensor | None = None
    codes: Tensor | None = None


class Codec(Network):
    config_class = CodecConfig
    config: CodecConfig

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        width = config.widths[-1]
        self.quantizer: FiniteScalars | VectorCodebook = FiniteScalars(config.levels)
        if config.quantizer == "vq":
            self.quantizer = VectorCodebook(config.num_codes, config.code_dims)
        self.encoder = residual_stages(nn.Conv2d(3, config.widths[0], config.patch, config.patch), config.widths)
        self.into = nn.Sequential(nn.GroupNorm(8, width), nn.Conv2d(width, self.quantizer.dims, 1))
        self.out_of = nn.Conv2d(self.quantizer.dims, width, 1)
        self.decoder = _up(config.patch, config.widths, config.depth)
        self.critic = _critic(config.widths) if config.critic_loss else None
        self._perceptual_layers: tuple[nn.Sequential, ...] = ()  # in a tuple: no part of this network
        self.reset_parameters()

    def use_perceptual_layers(self, layers: nn.Sequential) -> None:
        """Take the features of the loss from these layers (a `stem`), which are not trained."""
        self._perceptual_layers = (layers,)

    def initial(self, module: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
        if isinstance(module, nn.Conv2d):  # He et al. 2015
            yield module.weight, 0.0, math.sqrt(2 / module.weight[0].numel())
        elif isinstance(module, nn.GroupNorm):
            yield module.weight, 1.0, 0.0
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            yield bias, 0.0, 0.0

    def forward(self, x_B3HW: Tensor) -> Reconstruction:
        """Reconstruct pixels in -1 to 1 (`unit`), and take the loss."""
        q_BhwE, codes, commitment = self.quantizer(self._vectors(x_B3HW))
        made = self._draw(q_BhwE)
        error = made - x_B3HW
        losses_B = (error.abs() + error.square()).mean((1, 2, 3))
        if self.config.feature_loss:
            for real, own in zip(self._features(x_B3HW), self._features(made), strict=True):
                losses_B = losses_B + self.config.feature_loss * (real.detach() - own).square().sum(1).mean((1, 2))
        loss = losses_B.sum() + len(x_B3HW) * commitment
        if self.critic is not None:
            loss = loss + self._criticize(x_B3HW, made)
        return Reconstruction(loss, losses_B.detach(), made, codes)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to codes int64 [B, h, w]."""
        codes: Tensor = self.quantizer(self._vectors(unit(pixels)))[1]
        return codes

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] to uint8 [B, H, W, 3]."""
        return as_bytes(self._draw(self.quantizer.vectors(codes)))

    def _vectors(self, x_B3HW: Tensor) -> Tensor:
        z_BEhw: Tensor = self.into(self.encoder(x_B3HW))
        return z_BEhw.permute(0, 2, 3, 1)

    def _draw(self, q_BhwE: Tensor) -> Tensor:
        x: Tensor = self.decoder(self.out_of(q_BhwE.permute(0, 3, 1, 2)))
        return x.float()

    def _features(self, x_B3HW: Tensor) -> Iterator[Tensor]:
        """Features of images after each halving by a frozen encoder, every position scaled to length 1."""
        for layer in self._perceptual_layers[0] if self._perceptual_layers else self.encoder:
            x_B3HW = _held(layer, x_B3HW)
            if isinstance(layer, Residual):
                yield F.normalize(x_B3HW.float(), dim=1)

    def _criticize(self, real: Tensor, made: Tensor) -> Tensor:
        """The critic's hinge loss, and the codec's adversarial loss through the frozen critic; a sum over the
        images."""
        assert self.critic is not None
        told = F.relu(1 - self.critic(real)).mean() + F.relu(1 + self.critic(made.detach())).mean()
        return len(real) * (told - self.config.critic_loss * _held(self.critic, made).mean())


register_dataclass(Reconstruction)


def unit(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to fp32 [B, 3, H, W] in -1 to 1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def as_bytes(x_B3HW: Tensor) -> Tensor:
    """fp32 [B, 3, H, W] to uint8 [B, H, W, 3]."""
    return ((x_B3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _held(module: nn.Module, x: Tensor) -> Tensor:
    """A module's output with gradients to `x` alone."""
    still = {name: parameter.detach() for name, parameter in module.named_parameters()}
    found: Tensor = functional_call(module, still, (x,))
    return found


def _up(patch: int, widths: list[int], depth: int) -> nn.Sequential:
    """[B, widths[-1], h, w] to [B, 3, H, W]."""
    layers: list[nn.Module] = []
    for here, above in pairwise([*reversed(widths), 0]):
        layers += [Residual(here) for _ in range(depth)]
        if above:
            layers += [nn.Conv2d(here, 4 * above, 1), nn.PixelShuffle(2)]
    last = nn.Conv2d(widths[0], 3 * patch**2, 3, padding=1)
    return nn.Sequential(*layers, nn.GroupNorm(8, widths[0]), nn.GELU(), last, nn.PixelShuffle(patch))


def _critic(widths: list[int]) -> nn.Sequential:
    """[B, 3, H, W] to an opinion on each of its squares, [B, 1, h, w]."""
    layers: list[nn.Module] = []
    for below, here in zip([3, *widths[:-1]], widths, strict=True):
        layers += [nn.Conv2d(below, here, 4, 2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))
