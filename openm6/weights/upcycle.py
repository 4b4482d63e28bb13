"""A dense network becomes one of experts: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055)."""

from __future__ import annotations

from typing import Any

from openm6.core.errors import UsageError
from openm6.model.config import ModelConfig
from openm6.model.m6 import M6


def upcycle(
    model: M6, num_experts: int, experts_per_token: int = 2, router: str = "topk", expert_interval: int = 1
) -> M6:
    """A network that gives what `model` gives, with `num_experts` copies of its feed-forward in every
    `expert_interval`-th layer.

    The routers start at random. The weights of a token's experts sum to one, so equal experts give what one gives; they
    part in training because each sees other tokens. Raises UsageError where that cannot be.
    """
    old = model.config
    if old.num_experts:
        raise UsageError(f"This model has {old.num_experts} experts already; only a dense one is upcycled.")
    if old.bias:
        raise UsageError("The feed-forwards of this model have biases, which experts have not: it cannot be upcycled.")
    if experts_per_token < 2:
        raise UsageError(
            "Upcycling takes experts_per_token 2 or more: the weight of a single expert, always one, gives the router "
            "nothing to learn from."
        )
    changes: dict[str, Any] = {
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "router": router,
        "expert_interval": expert_interval,
        "normalize_expert_weights": True,
    }
    made = M6(ModelConfig(**{**old.to_dict(), **changes}))
    weights = model.state_dict()
    for layer in made.config.expert_layers():
        for name in ("up", "down"):
            place = f"blocks.{layer}.feed_forward"
            weights[f"{place}.experts.{name}"] = weights.pop(f"{place}.{name}.weight").expand(num_experts, -1, -1)
        router_weight = f"blocks.{layer}.feed_forward.router.weight"
        weights[router_weight] = made.state_dict()[router_weight]
    made.load_state_dict(weights)
    return made
