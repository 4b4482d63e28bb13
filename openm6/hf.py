"""M6 for transformers: after `import openm6.hf`, AutoConfig and AutoModel open model directories of OpenM6."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization

from openm6.core.batch import Batch
from openm6.model.config import ModelConfig
from openm6.model.m6 import M6, Output


class M6Config(PreTrainedConfig):
    """A config.json of OpenM6; `sizes` is the ModelConfig of the network."""

    model_type = ModelConfig.model_type

    @property
    def sizes(self) -> ModelConfig:
        names = [field.name for field in fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names if hasattr(self, name)})


class M6Model(PreTrainedModel):
    """openm6.model.M6 as `network`; files have the names of its tensors without that prefix."""

    config_class = M6Config
    base_model_prefix = "network"
    main_input_name = "batch"
    _supports_sdpa = True

    def __init__(self, config: M6Config):
        super().__init__(config)
        self.network = M6(config.sizes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for parameter, mean, std in self.network.initial(module):
            initialization.normal_(parameter, mean, std) if std else initialization.constant_(parameter, mean)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embed

    def forward(self, batch: Batch, **more: Any) -> Output:
        """See M6.forward."""
        return self.network(batch, **more)  # type: ignore[no-any-return]


AutoConfig.register(ModelConfig.model_type, M6Config)
AutoModel.register(M6Config, M6Model)
