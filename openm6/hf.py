"""M6 for transformers: after `import openm6.hf`, its AutoModel and AutoModelForCausalLM open model directories."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from openm6.core.batch import Batch
from openm6.core.errors import UsageError
from openm6.model.config import ModelConfig
from openm6.model.m6 import M6, Output
from openm6.model.rotary import rotary_angles


class M6Config(PreTrainedConfig):
    """A config.json of OpenM6; `sizes` is the ModelConfig of the network."""

    model_type = ModelConfig.model_type

    @property
    def sizes(self) -> ModelConfig:
        names = [field.name for field in fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names if hasattr(self, name)})


class M6PreTrained(PreTrainedModel):
    """openm6.model.M6 as `network`; files have the names of its tensors without that prefix. Raises UsageError for a
    directory with quantized weights."""

    config_class = M6Config
    base_model_prefix = "network"
    _supports_sdpa = True

    def __init__(self, config: M6Config):
        super().__init__(config)
        if config.sizes.weight_bits:
            raise UsageError("The weights are quantized, which transformers cannot open: take the original model.")
        self.network = M6(config.sizes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for parameter, mean, std in self.network.initial(module):
            initialization.normal_(parameter, mean, std) if std else initialization.constant_(parameter, mean)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embed


class M6Model(M6PreTrained):
    """The network with its own interface."""

    main_input_name = "batch"

    def forward(self, batch: Batch, **more: Any) -> Output:
        """See M6.forward."""
        return self.network(batch, **more)  # type: ignore[no-any-return]


class M6ForCausalLM(M6PreTrained, GenerationMixin):
    """The network as a language model of texts: `model(input_ids=, attention_mask=, labels=)` and `generate`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        source_mask: Tensor | None = None, past_key_values: Cache | None = None, use_cache: bool | None = None,
        logits_to_keep: int = 0, **more: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits fp32 [B, T, V] and, with `labels` [B, T] (those of transformers: the ids themselves, -100 where
        nothing is to be predicted), the mean loss of the next tokens.

        `attention_mask` [B, P + T] is 0 on padding, on either side; P positions are in `past_key_values`. A position
        sees those before it. `source_mask` [B, P + T or less] is 1 on those of a source, which see each other both
        ways, as a model with a bidirectional source has learned it; all of them have to be in one call, as in
        `generate`.
        """
        rows, length = input_ids.shape
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        real_BS = torch.ones(rows, past + length, device=input_ids.device) if attention_mask is None else attention_mask
        real_BS = real_BS.bool()
        positions_BT = (real_BS.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        queries = torch.arange(past, past + length, device=input_ids.device)
        keys = torch.arange(past + length, device=input_ids.device)
        seen = (keys <= queries[:, None]).expand(rows, -1, -1)
        if source_mask is not None:
            source_BS = pad(source_mask.bool(), (0, past + length - source_mask.shape[1]))
            seen = seen | (source_BS[:, past:, None] & source_BS[:, None])
        itself = keys == queries[:, None]  # padding sees itself: a row of nothing has no softmax
        mask = (seen & real_BS[:, None]) | itself
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        network = self.network
        x_BTD = network.embed_ids(input_ids, positions_BT)
        rope = rotary_angles(network.config, positions_BT, network.product_dtype(x_BTD))
        cache = None if past_key_values is None else _View(past_key_values)
        hidden_BTD, _ = network.backbone(x_BTD, rope, mask[:, None], cache)
        logits = network.logits(hidden_BTD[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=network.config.vocab_size, **more)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


class _View:
    """transformers' cache, as the blocks of a network use one (model/cache.py)."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def update(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        k_BKSE, v_BKSE = self.cache.update(k_BKTE.to(v_BKTE.dtype), v_BKTE, layer)
        return k_BKSE, v_BKSE


AutoConfig.register(ModelConfig.model_type, M6Config)
AutoModel.register(M6Config, M6Model)
AutoModelForCausalLM.register(M6Config, M6ForCausalLM)
