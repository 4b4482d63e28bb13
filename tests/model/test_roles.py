"""The role of every parameter, by where it is in the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.model import M6, ModelConfig
from openm6.model.adapters import adapter_config, add_adapter
from openm6.model.changed import Prompt
from openm6.model.files import meta_model
from openm6.model.roles import Role, role_of

NETWORK = {
    "embed.weight": Role.EMBEDDING, "place.weight": Role.EMBEDDING, "prompt.weight": Role.EMBEDDING,
    "image.row": Role.PATCH_POSITION, "image.column": Role.PATCH_POSITION,
    "image.features.0.weight": Role.IMAGE_ENCODER, "image.features.1.norm1.weight": Role.NORM,
    "image.project.0.weight": Role.NORM, "image.project.1.weight": Role.IMAGE_ENCODER,
    "blocks.0.attention_norm.weight": Role.NORM, "blocks.0.attention.q_norm.weight": Role.NORM,
    "blocks.0.attention.qkv.weight": Role.MATRIX, "blocks.0.attention.out.bias": Role.MATRIX,
    "blocks.0.feed_forward.up.weight": Role.MATRIX, "blocks.1.feed_forward.router.weight": Role.ROUTER,
    "blocks.1.feed_forward.router.bias": Role.ROUTER, "blocks.1.feed_forward.experts.up": Role.EXPERT,
    "blocks.1.feed_forward.shared.down.weight": Role.MATRIX, "norm.weight": Role.NORM, "head.weight": Role.HEAD,
    "heads.depth.weight": Role.HEAD, "heads.depth.bias": Role.HEAD,
}  # fmt: skip

ADAPTERS = {
    "lora": {"lora_A.default.weight": Role.ADAPTER_INPUT, "lora_B.default.weight": Role.MATRIX},
    "ia3": {"ia3_l.default": Role.SCALE},
    "bottleneck": {"down.weight": Role.ADAPTER_INPUT, "up.weight": Role.MATRIX},
}


def test_every_parameter_of_the_network_has_its_role() -> None:
    sizes = {"num_experts": 2, "expert_interval": 2, "shared_intermediate_size": 64, "bias_update": 0.1}
    sizes |= {"bias": True, "qk_norm": True, "positions": "learned", "heads": {"depth": 3}}
    model = meta_model(ModelConfig.preset("demo", tie_word_embeddings=False, **sizes))
    model.prompt = Prompt(1, 4, model.config.hidden_size)
    found = {name: role_of(model, name) for name in model.state_dict()}
    assert {name: found[name] for name in NETWORK} == NETWORK
    assert set(found.values()) == set(NETWORK.values())


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_parameters_of_an_adapter_have_theirs(method: str) -> None:
    model: M6 = meta_model(ModelConfig.preset("demo"))
    before = {name: role_of(model, name) for name in model.state_dict()}
    add_adapter(model, adapter_config(Path("base"), method))
    trained = {name: role_of(model, name) for name, p in model.named_parameters() if p.requires_grad}
    for end, role in ADAPTERS[method].items():
        assert {found for name, found in trained.items() if name.endswith(end)} == {role}
    assert set(trained.values()) == set(ADAPTERS[method].values())
    kept = {name.replace(".base_layer", ""): role_of(model, name) for name in model.state_dict() if name not in trained}
    assert kept == {name: before[name] for name in kept}
