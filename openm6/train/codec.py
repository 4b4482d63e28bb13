"""The objective of the image codec: pictures, and how well they come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openm6.core.errors import DataError, UsageError
from openm6.core.images import read_square
from openm6.data.columns import SlotView
from openm6.data.loader import Entry
from openm6.inference.session import Session
from openm6.model.codec import Codec, CodecConfig, Reconstruction, unit
from openm6.model.files import meta_model
from openm6.tasks.task import Task
from openm6.train.distributed import Group
from openm6.train.objective import MicroBatchResult, Objective
from openm6.train.recipe import CodecRecipe
from openm6.train.setup import make_loader, open_rejects, open_section

SHOWN = 12
"""Pictures in a reconstruction grid."""


@dataclass(slots=True)
class Picture:
    """An example: uint8 [size, size, 3], and the name of its source."""

    pixels: np.ndarray
    origin: str = ""


TASK = Task.from_instruction("[image] -> [vector:codes]", "codec")
"""The task of a codec's records. They have one slot, `image`, which `read_picture` reads."""


def read_picture(record: Mapping[str, Any], size: int) -> Picture:
    """The middle square of a record's picture, `size` pixels wide. Raises DataError."""
    if record.get("image") is None:
        raise DataError("There is no picture in this record.")
    return Picture(read_square(record["image"], size))


class CodecObjective(Objective):
    """The Objective of an image codec: images and their reconstructions."""

    def __init__(self, recipe: CodecRecipe, group: Group):
        self.recipe, self.device = recipe, group.device
        self.path, self.notes = recipe.codec.path, list[str]()
        self.config = CodecConfig.load(self.path) if self.path else CodecConfig(**recipe.codec.sizes)
        size = self.config.image_size
        reader = recipe.codec.perceptual_model
        self.perceptual = _stem_of(reader).to(self.device) if reader else None
        rejects = open_rejects(recipe.output, recipe.train, group)

        def encode(task: Task, record: Mapping[str, Any], *rest: Any) -> Any:
            return read_picture(record, size)

        entries = [
            Entry(s.name or s.source, open_section(s, rejects), TASK, s.weight, s.columns, s.start, encode=encode)
            for s in recipe.data
        ]
        self.loader = make_loader(recipe, group, entries, None, rejects)
        sources = [(s.name or s.source, open_section(s), s.columns) for s in recipe.evaluation.data]
        self.measured = [(n, source, SlotView.of(TASK, source, columns)) for n, source, columns in sources]
        self.flops = _training_flops(self.config)

    def network(self, shared: bool) -> Codec:
        codec = meta_model(self.config, Codec)
        if self.perceptual is not None:
            codec.use_perceptual_layers(self.perceptual)
        return codec

    def loss_weight(self, examples: list[Picture]) -> tuple[int, int, int]:
        return len(examples), len(examples), 0

    def micro_batches(self, examples: list[Picture]) -> list[list[Picture]]:
        return [examples]

    def micro_batch_loss(self, run: Callable[[Tensor], Reconstruction], examples: list[Picture]) -> MicroBatchResult:
        output = run(unit(_stack(examples, self.device)))
        assert output.loss is not None and output.losses is not None
        told = [(TASK.name, e.origin, loss, 1) for e, loss in zip(examples, output.losses.tolist(), strict=True)]
        positions = len(examples) * self.config.side**2
        return MicroBatchResult(output.loss, told, len(examples) * self.flops, positions, positions)

    def evaluate(self, model: Codec) -> Iterator[tuple[str, Mapping[str, float]]]:
        """PSNR, SSIM and the fraction of codes in use; a grid of pictures above their reconstructions as PNG."""
        model.eval()
        for name, source, view in self.measured:
            count = min(len(source), self.recipe.evaluation.limit)
            pictures = [read_picture(view(source[i]), self.config.image_size) for i in range(count)]
            file = "".join(c if c.isalnum() else "-" for c in name).strip("-") + ".png"
            yield name, self._measure(model, pictures, self.recipe.output / "reconstructions" / file)

    def describe(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.config.save(path)

    def _measure(self, model: Codec, pictures: list[Picture], grid: Path) -> dict[str, float]:
        used = torch.zeros(self.config.num_codes, dtype=torch.bool)
        psnr, similar = [], []
        for start in range(0, len(pictures), 64):
            real = _stack(pictures[start : start + 64], self.device)
            codes = model.encode(real)
            made = model.decode(codes)
            used[codes.flatten().cpu()] = True
            error = (real.float() - made.float()).square().mean((1, 2, 3)).clamp(min=1e-3)
            psnr += (10 * torch.log10(255**2 / error)).tolist()
            similar += structural_similarity(*(x.permute(0, 3, 1, 2).float() for x in (made, real))).tolist()
            if start == 0:  # originals in a row, their reconstructions below
                grid.parent.mkdir(parents=True, exist_ok=True)
                rows = [torch.cat(list(some[:SHOWN].cpu()), 1) for some in (real, made)]
                Image.fromarray(torch.cat(rows).numpy()).save(grid)
        found = {"psnr": np.mean(psnr), "ssim": np.mean(similar), "codes_used": used.float().mean()}
        return {name: float(value) for name, value in found.items()}


def _stem_of(path: Path) -> nn.Sequential:
    """The stem that a model reads pictures with."""
    embedder = Session.load(path, device="cpu", trainable=True).model.image
    if embedder is None or not isinstance(embedder.features, nn.Sequential):
        raise UsageError(f"codec.perceptual_model: {path} has no stem; its image_embedder has to be stem.")
    return embedder.features.requires_grad_(False)


def _stack(pictures: list[Picture], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(device)


def _training_flops(config: CodecConfig) -> float:
    """FLOPs of the forward and backward pass of one picture, counted on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    model = meta_model(config, Codec).eval()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, config.image_size, config.image_size)).loss.backward()
    return float(counter.get_total_flops())


def structural_similarity(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """SSIM of pairs of pictures with values from 0 to 255 and sides of more than 5, fp32 [B]: the mean over all pixels
    of an 11 x 11 Gaussian window with a standard deviation of 1.5; beyond the edge a picture is reflected."""
    weights = torch.exp(-(torch.arange(-5.0, 6.0, device=first_BCHW.device) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    channels = first_BCHW.shape[1]
    window = torch.outer(weights, weights).expand(channels, 1, 11, 11)

    def mean(values: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(values, (5, 5, 5, 5), "reflect"), window, groups=channels)

    first, second = mean(first_BCHW), mean(second_BCHW)
    first_variance = (mean(first_BCHW**2) - first**2).clamp(min=0)
    second_variance = (mean(second_BCHW**2) - second**2).clamp(min=0)
    covariance = mean(first_BCHW * second_BCHW) - first * second
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * first * second + c1) / (first**2 + second**2 + c1)
    structure = (2 * covariance + c2) / (first_variance + second_variance + c2)
    return (luminance * structure).mean((1, 2, 3))
