"""The values that the parameters of an M6 start with."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from openm6.model.config import ModelConfig
from openm6.model.embed import ImageEmbedder
from openm6.model.experts import Experts, Router


def initial_values(config: ModelConfig, module: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
    """Normal(0, initializer_range); what writes into the stream is scaled by 1/sqrt(2 layers) (GPT-2),
    convolutions by their inputs (He et al. 2015)."""
    std, last = config.initializer_range, 1 / math.sqrt(2 * config.num_hidden_layers)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        if getattr(module, "writes_to_stream", False):
            std *= last
        elif isinstance(module, nn.Linear) and getattr(module, "enters_stream", False):
            # Its inputs have unit scale; its outputs get a token's.
            std /= math.sqrt(module.in_features)
        yield module.weight, 0.0, std
    elif isinstance(module, (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
        yield module.weight, 1.0, 0.0
    elif isinstance(module, nn.Conv2d):
        inputs = module.weight[0].numel()
        if config.image_embedder == "resnet":  # transformers' rule: by its outputs
            inputs = module.weight[:, 0].numel()
        enters = getattr(module, "enters_stream", False)  # the projection of patches
        yield module.weight, 0.0, std if enters else math.sqrt(2 / inputs)
    elif isinstance(module, Router):
        yield module.weight, 0.0, std
    elif isinstance(module, Experts):
        yield module.up, 0.0, std
        yield module.down, 0.0, std * last
    elif isinstance(module, ImageEmbedder):
        yield module.row, 0.0, std
        yield module.column, 0.0, std
    if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
        yield bias, 0.0, 0.0
