"""The distribution of a network over processes, from outside: the network itself never asks for its rank.

    none    every process holds everything; gradients are reduced (DistributedDataParallel)
    zero2   gradients and optimizer states are sharded, parameters stay gathered from forward to backward (FSDP2)
    zero3   parameters too: a layer is gathered when it is needed, and let go

With `offload`, states of the first layers live in the host's memory (train/offload.py). Parameters there are copied to
the device when they are gathered, the next layer's while one computes, and updated on the host.

With `experts` P, the processes form a mesh [data, P]: expert n of N lives on the processes of column n P / N, and is
sharded over its column as above; all other parameters are sharded over all processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from openm6.core.batch import Batch
from openm6.core.errors import UsageError
from openm6.model import M6
from openm6.model.experts import MixtureOfExperts
from openm6.train.distributed import Group, local
from openm6.train.expert_parallel import AllToAll
from openm6.train.offload import HostStates, Offload
from openm6.train.optimizer import step_all
from openm6.train.recipe import ParallelSection

_KEPT = ("mm", "addmm", "_grouped_mm", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "flex_attention")  # fmt: skip
"""Operations whose results selective recomputation keeps: products with weights, and fused attention."""


class Parallel:
    """A network distributed over a group. `run(batch)` is its forward pass; a loss times `scale` gives gradients that
    are sums over the processes."""

    def __init__(self, model: M6, settings: ParallelSection, group: Group, dtype: torch.dtype):
        self.model, self.group = model, group
        self.sharded = settings.sharding != "none"
        _check(model, settings, group)
        _recompute(model, settings.recompute)
        self.scale = 1.0
        self.run: Callable[[Batch], Any] = model
        self.host: HostStates | None = None
        self.offload = Offload()
        if self.sharded:
            self.offload = Offload.of(settings.offload, len(model.blocks))
            _shard(model, settings, self.offload.parameters, group, dtype)
        if not next(model.parameters()).is_meta:
            self._attach()

    def allocate(self) -> None:
        """Allocate this process's part of a network without memory; the values are still to be filled."""
        model, device = self.model, self.group.device
        if self.offload.parameters:
            for part in model.children():
                if part is not model.blocks:
                    part.to_empty(device=device)
            for number, block in enumerate(model.blocks):
                block.to_empty(device=torch.device("cpu") if number < self.offload.parameters else device)
        elif self.sharded:
            model.to_empty(device=device)
        else:  # `to_empty` of tensors without memory imports PyTorch's compiler
            model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        self._attach()

    def _attach(self) -> None:
        """Set up offload or DistributedDataParallel, which refer to the parameters that `allocate` creates."""
        if self.sharded:
            if self.offload.layers > self.offload.parameters:
                self.host = HostStates(self.model.blocks, self.offload, self.group.device)
        elif self.group.world > 1:
            self.scale = float(self.group.world)  # DistributedDataParallel takes the mean
            self.run = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def synchronize(self, last: bool) -> None:
        """Only the last micro-batch of a step exchanges gradients."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif self.group.world > 1:
            self.run.require_backward_grad_sync = last  # type: ignore[attr-defined]

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale all gradients so that their norm is at most `limit`; returns the norm before, over all processes."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.host is not None:
            self.host.wait()
            gradients += self.host.gradients.values()
        places: dict[torch.device, list[Tensor]] = defaultdict(list)  # those of offloaded layers are the host's
        for gradient in map(local, gradients):
            places[gradient.device].append(gradient)
        squares = [torch.stack(torch._foreach_norm(some)).square().sum() for some in places.values()]
        total = torch.stack([square.to(self.group.device) for square in squares]).sum()
        if self.sharded:  # each process holds its part of every gradient
            total = self.group.sum(total)
        norm = total.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for device, some in places.items():
            torch._foreach_mul_(some, scale.to(device))
        return norm

    def update(self, optimizers: list[Optimizer]) -> None:
        """Step by the gradients on the device and the host, and clear them."""
        if self.host is not None:
            self.host.update(optimizers)
        else:
            step_all(optimizers)


def _check(model: M6, settings: ParallelSection, group: Group) -> None:
    size = settings.experts
    if settings.offload.optimizer + settings.offload.gradients and settings.sharding == "none":
        raise UsageError("parallel.offload needs parallel.sharding zero2 or zero3.")
    if size == 1:
        return
    experts = model.config.num_experts
    if not experts:
        raise UsageError(f"parallel.experts is {size}, but this model has no experts.")
    if experts % size:
        raise UsageError(f"parallel.experts ({size}) has to divide the number of experts ({experts}).")
    if group.world % size:
        raise UsageError(f"parallel.experts ({size}) has to divide the number of processes ({group.world}).")
    if settings.sharding == "none":
        raise UsageError("parallel.experts above 1 needs parallel.sharding zero2 or zero3.")


def _shard(model: M6, settings: ParallelSection, offloaded: int, group: Group, dtype: torch.dtype) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if not dist.is_initialized():
        raise UsageError("parallel.sharding needs processes to shard over: start with --processes or torchrun.")
    columns = settings.experts
    mesh = init_device_mesh(group.device.type, (group.world // columns, columns), mesh_dim_names=("data", "expert"))
    everyone = mesh["data", "expert"]._flatten("all")
    # Inside the blocks products run in bf16 on gathered bf16 weights; sharded weights, gradients and moments are fp32.
    # The stream between them stays fp32.
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    again = settings.sharding == "zero3"
    sharded: list[Any] = []
    for number, block in enumerate(model.blocks):
        layer = block.feed_forward
        place = CPUOffloadPolicy(pin_memory=group.device.type == "cuda") if number < offloaded else OffloadPolicy()
        how: dict[str, Any] = {"mp_policy": low, "reshard_after_forward": again, "offload_policy": place}
        if columns > 1 and isinstance(layer, MixtureOfExperts):
            _spread(layer, mesh["expert"])
            sharded.append(fully_shard(layer.experts, mesh=mesh["data"], **how))
            _hide_hooks(layer.experts)
        sharded.append(fully_shard(block, mesh=everyone, **how))
    sharded.append(fully_shard(model, mesh=everyone, reshard_after_forward=False))
    _let_answer(model, group)
    for module in sharded:
        module.set_gradient_divide_factor(1.0)  # sums, as `Parallel.scale` says
        module.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing while it reduces


def _let_answer(model: M6, group: Group) -> None:
    """Let a sharded network decode between two steps, when all processes make the same calls. All use the logits of the
    first process, so that rounding cannot stop one of them earlier than another."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for name in ("decode", "logits"):
        register_fsdp_forward_method(model, name)
    own = model.logits

    def logits(hidden: Tensor) -> Tensor:
        found = own(hidden)
        if group.world > 1:
            dist.broadcast(found, 0)
        return found

    model.logits = logits  # type: ignore[method-assign]


def _hide_hooks(module: nn.Module) -> None:
    """Selective recomputation counts the operations of both passes over a layer, and FSDP2's hooks on a module inside
    do other things in the second one: keep them out of its sight."""
    from torch.utils._python_dispatch import _disable_current_modes

    def hidden(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            with _disable_current_modes():
                return hook(*args, **keywords)

        return run

    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            hooks[key] = hidden(hook)


def _spread(layer: MixtureOfExperts, column: Any) -> None:
    """Keep this process's part of the experts, and set the layer's exchange with the others."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(distribute_tensor(weight.detach(), column, [Shard(0)])))
    layer.exchange = AllToAll(column.get_group())


def _recompute(model: M6, how: str) -> None:
    """Save fewer activations of a block's forward pass, and recompute them in its backward pass."""
    if how == "none":
        return
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    more: dict[str, Any] = {}
    if how == "selective":

        def policy(_: Any, operation: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
            name, _, overload = operation.__name__.partition(".")
            kept = name in _KEPT and overload in ("", "default")  # what is written into (mm.out) cannot be kept
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        more["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **more)  # type: ignore[method-assign]
