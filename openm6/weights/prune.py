"""Pruning: whole layers, heads, units of the feed-forward and experts are removed, those with the least effect on the
loss of given examples.

The effect of a layer is how much the loss rises without it, measured; layers go one after the other. The effect of a
unit, a group of heads (all that share keys and values) or an expert is estimated to first order, |gate * gradient| of a
gate of one behind it (Molchanov et al. 2019, arXiv 1906.10771; heads: Michel et al. 2019, arXiv 1905.10650), so an
expert's load counts as well as its outputs. Further training recovers most of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Items
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from openm6.core.batch import Batch
from openm6.core.errors import UsageError
from openm6.model.block import Block
from openm6.model.config import ModelConfig
from openm6.model.experts import MixtureOfExperts, Routing
from openm6.model.files import meta_model
from openm6.model.m6 import M6


def prune(
    model: M6,
    batches: Items[Batch],
    *,
    layers: int | None = None,
    key_value_heads: int | None = None,
    width: int | None = None,
    experts: int | None = None,
) -> M6:
    """A network of so many layers, heads of keys and values (with the queries' that belong to them), units of each
    dense feed-forward, and experts a layer; None leaves what there is. `model` stays as it is.

    `batches` have labels. Raises UsageError where that cannot be.
    """
    config = model.config
    if config.distinct_layers is not None:
        raise UsageError("This model's layers share weights: there is nothing to leave out.")
    for name, wanted, there in (
        ("layers", layers, config.num_hidden_layers), ("key_value_heads", key_value_heads, config.num_key_value_heads),
        ("width", width, config.intermediate_size), ("experts", experts, config.num_experts),
    ):  # fmt: skip
        if wanted is not None and not 1 <= wanted <= there:
            raise UsageError(f"{name} is {wanted}; the model has {there}.")
    if width is not None and len(config.expert_layers()) == config.num_hidden_layers:
        raise UsageError("width is of dense feed-forwards; this model has experts in all layers.")
    if experts is not None and (experts < config.experts_per_token or experts % config.expert_groups):
        raise UsageError(
            f"experts is {experts}; each token sees {config.experts_per_token}, and of each group (router "
            f"{config.router}) as many stay: give a multiple of {config.expert_groups}."
        )
    model = _fewer_layers(model, batches, layers or config.num_hidden_layers)
    if key_value_heads or width or experts:
        model = _narrower(model, _effects(model, batches), key_value_heads, width, experts)
    return model


# Layers


def _fewer_layers(model: M6, batches: Items[Batch], wanted: int) -> M6:
    kept = list(range(model.config.num_hidden_layers))
    while len(kept) > wanted:
        trials = []
        for layer in kept:
            rest = [other for other in kept if other != layer]
            if (config := _config_of(model.config, rest)) is not None:
                trials.append((_loss(_of_blocks(model, config, rest), batches), rest))
        if not trials:
            raise UsageError(
                f"Of {len(kept)} layers none can be left out: experts have to stand in every n-th of those that stay."
            )
        kept = min(trials, key=lambda trial: trial[0])[1]
    config = _config_of(model.config, kept)
    assert config is not None
    return _filled(config, _of_blocks(model, config, kept).state_dict())


def _config_of(config: ModelConfig, kept: list[int]) -> ModelConfig | None:
    """The configuration with these layers alone; None where none can express which of them have experts."""
    sparse = [place for place, layer in enumerate(kept) if layer in config.expert_layers()]
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if not config.num_experts:
        return replace(config, **changes)
    if not sparse:
        return None
    for interval, dense in product(range(1, len(kept) + 1), range(len(kept))):
        if [layer for layer in range(interval - 1, len(kept), interval) if layer >= dense] == sparse:
            return replace(config, **changes, expert_interval=interval, dense_layers=dense)
    return None


def _of_blocks(model: M6, config: ModelConfig, kept: list[int]) -> M6:
    """A network of the same modules with only these blocks."""
    made = meta_model(config)
    for name, module in model.named_children():
        setattr(made, name, module)
    made.blocks = nn.ModuleList(model.blocks[layer] for layer in kept)
    return made.eval()


@torch.no_grad()
def _loss(model: M6, batches: Iterable[Batch]) -> float:
    return sum(float(loss) for batch in batches if (loss := model(batch).loss) is not None)


# What is inside a layer


def _effects(model: M6, batches: Items[Batch]) -> list[dict[str, Tensor]]:
    """For every block the effects of its groups of heads [K] and of its units [F] or experts [N]."""
    gates: list[dict[str, Tensor]] = []
    with ExitStack() as stack:
        for block in model.blocks:
            assert isinstance(block, Block)
            heads = torch.ones(model.config.num_key_value_heads, requires_grad=True, device=model.embed.weight.device)
            gates.append({"heads": heads})
            hooks = [block.attention.out.register_forward_pre_hook(_behind(heads))]
            forward = block.feed_forward
            if isinstance(forward, MixtureOfExperts):
                gates[-1]["experts"] = gate = heads.new_ones(forward.number, requires_grad=True)
                hooks.append(forward.router.register_forward_hook(_chosen(gate)))
            else:
                gates[-1]["units"] = gate = heads.new_ones(forward.down.in_features, requires_grad=True)
                hooks.append(forward.down.register_forward_pre_hook(_behind(gate)))
            for hook in hooks:
                stack.callback(hook.remove)
        sums = [{name: torch.zeros_like(gate) for name, gate in block.items()} for block in gates]
        flat = [gate for block in gates for gate in block.values()]
        for batch in batches:
            found = iter(torch.autograd.grad(model(batch).loss, flat, allow_unused=True, materialize_grads=True))
            for effects in sums:
                for effect in effects.values():
                    effect += next(found).abs()
    return sums


def _behind(gate: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = given
        return ((x.unflatten(-1, (len(gate), -1)) * gate[:, None].to(x.dtype)).flatten(-2),)

    return hook


def _chosen(gate: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, given: Any, routing: Routing) -> Routing:
        return routing._replace(weights_TK=routing.weights_TK * gate[routing.experts_TK])

    return hook


def _best(effect: Tensor, wanted: int, groups: int = 1) -> Tensor:
    """Indices of the `wanted` largest effects, ascending, as many from each of `groups` equal groups."""
    size, each = len(effect) // groups, wanted // groups
    found = effect.unflatten(0, (groups, size)).topk(each, dim=1).indices
    return (found + torch.arange(0, len(effect), size, device=found.device)[:, None]).flatten().sort().values


def _narrower(
    model: M6, effects: list[dict[str, Tensor]], heads: int | None, width: int | None, experts: int | None
) -> M6:
    old, weights = model.config, dict(model.state_dict())
    heads = heads or old.num_key_value_heads
    queries, size = old.num_attention_heads // old.num_key_value_heads, old.head_dim

    def cut(name: str, rows: Tensor, dim: int = 0) -> None:
        if name in weights:
            weights[name] = weights[name].index_select(dim, rows)

    for number, effect in enumerate(effects):
        place = f"blocks.{number}"
        kept = _best(effect["heads"], heads)
        of_keys = _spread(kept, size)
        of_queries = _spread(kept, queries * size)
        first = old.num_attention_heads * size
        rows = torch.cat((of_queries, first + of_keys, first + old.num_key_value_heads * size + of_keys))
        cut(f"{place}.attention.qkv.weight", rows)
        cut(f"{place}.attention.qkv.bias", rows)
        cut(f"{place}.attention.out.weight", of_queries, 1)
        inner = f"{place}.feed_forward"
        if "units" in effect and width:
            units = _best(effect["units"], width)
            both = torch.cat((units, units + old.intermediate_size)) if old.activation == "swiglu" else units
            cut(f"{inner}.up.weight", both)
            cut(f"{inner}.up.bias", both)
            cut(f"{inner}.down.weight", units, 1)
        elif "experts" in effect and experts:
            some = _best(effect["experts"], experts, old.expert_groups)
            for name in ("router.weight", "router.bias", "experts.up", "experts.down"):
                cut(f"{inner}.{name}", some)
    changes: dict[str, Any] = {
        "num_key_value_heads": heads, "num_attention_heads": heads * queries,
        "num_experts": experts or old.num_experts, "intermediate_size": width or old.intermediate_size,
    }  # fmt: skip
    return _filled(replace(old, **changes), weights)


def _spread(numbers: Tensor, size: int) -> Tensor:
    """Indices of the rows of these parts, `size` rows each."""
    return (numbers[:, None] * size + torch.arange(size, device=numbers.device)).flatten()


def _filled(config: ModelConfig, weights: dict[str, Tensor]) -> M6:
    with torch.device(next(iter(weights.values())).device):
        made = M6(config)
    made.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return made.eval()
