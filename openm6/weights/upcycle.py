"""A dense network becomes one of experts: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055)."""

from __future__ import annotations

from dataclasses import replace

from openm6.core.errors import UsageError
from openm6.model.m6 import M6
from openm6.model.roles import Role, role_of


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
    config = replace(
        old, num_experts=num_experts, experts_per_token=experts_per_token, router=router,
        expert_interval=expert_interval, normalize_expert_weights=True,
    )  # fmt: skip
    made = M6(config)
    dense, sparse = model.state_dict(), made.state_dict()
    for name, weight in sparse.items():
        role = role_of(made, name)
        if role is Role.EXPERT:
            weight.copy_(dense[name.replace(".experts", "") + ".weight"])  # the same in each of them
        elif role is not Role.ROUTER:
            weight.copy_(dense[name])
    return made
