"""Granular offload (M6-10T, arXiv 2110.03888): which states of which layers live in the host's memory.

Offloaded parameters are FSDP2's business (train/parallel.py): a layer's come to the device when it is gathered, its
gradients and moments stay with them, and it is updated on the host. Here are the layers whose parameters stay on the
device, and whose gradients, optimizer moments or both leave it: gradients as soon as they are reduced; moments only
visit for their layer's update, the next layer's on their way while one is updated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openm6.train.distributed import local
from openm6.train.optimizer import step_all
from openm6.train.recipe import OffloadSection


@dataclass(frozen=True, slots=True)
class Offload:
    """Number of layers, from the first on, whose states are in the host's memory."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @staticmethod
    def of(section: OffloadSection, layers: int) -> Offload:
        return Offload(*(round(share * layers) for share in (section.parameters, section.gradients, section.optimizer)))

    @property
    def layers(self) -> int:
        """Number of layers with any offloaded state."""
        return max(self.parameters, self.gradients, self.optimizer)


class HostStates:
    """Gradients and moments away from the device of a network whose `blocks` are sharded.

    The optimizers' own state is what is moved: between two updates `optimizer.state` holds tensors of the host, so that
    checkpoints read and write them as they do all others.
    """

    def __init__(self, blocks: nn.ModuleList, offload: Offload, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self._layers = [list(blocks[n].parameters()) for n in range(offload.parameters, offload.layers)]
        self._away = {p for n in range(offload.parameters, offload.optimizer) for p in blocks[n].parameters()}
        self._kept: dict[tuple[nn.Parameter, str], Tensor] = {}  # in the host's memory, page-locked for a GPU
        for number in range(offload.parameters, offload.gradients):
            for parameter in filter(lambda p: p.requires_grad, blocks[number].parameters()):
                parameter.register_post_accumulate_grad_hook(self._leave)

    @property
    def bytes(self) -> int:
        """Bytes of this process in the host's memory."""
        return sum(local(tensor).nbytes for tensor in self._kept.values())

    def wait(self) -> None:
        """Wait until all transfers from the device have arrived, and `gradients` can be read."""
        if self.side is not None:
            self.side.synchronize()

    @torch.no_grad()
    def update(self, optimizers: list[Optimizer]) -> None:
        """A step of all optimizers: first for the parameters on the device, then layer by layer."""
        mine = [self._take(layer) for layer in self._layers]
        step_all(optimizers)
        found = [gradients for gradients in mine if gradients]
        coming = self._fetch(found[0], optimizers) if found else None
        for number in range(len(found)):
            assert coming is not None
            self._arrive(*coming)
            coming = self._fetch(found[number + 1], optimizers) if number + 1 < len(found) else None
            step_all(optimizers)
            self._store(found[number], optimizers)
        self.wait()

    def _leave(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        self.gradients[parameter] = self._to_host(parameter, "gradient", parameter.grad)
        parameter.grad = None

    def _take(self, layer: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Remove and return the gradients of a layer, on the device or the host."""
        taken = {}
        for parameter in layer:
            gradient = self.gradients.pop(parameter, parameter.grad)
            if gradient is not None:
                taken[parameter] = gradient
            parameter.grad = None
        return taken

    def _fetch(
        self, gradients: dict[nn.Parameter, Tensor], optimizers: list[Optimizer]
    ) -> tuple[dict[nn.Parameter, Tensor], list[tuple[dict[str, Any], str, Tensor]], Any]:
        """Start to transfer a layer's gradients and moments to the device."""
        with self._beside():
            there = {p: self._to_device(g) if g is self._kept.get((p, "gradient")) else g for p, g in gradients.items()}
            moving = self._moments(gradients, optimizers)
            moments = [(state, name, self._to_device(moment)) for _, state, name, moment in moving]
            return there, moments, self.side and self.side.record_event()

    def _arrive(
        self, gradients: dict[nn.Parameter, Tensor], moments: list[tuple[dict[str, Any], str, Tensor]], event: Any
    ) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
            for tensor in (*gradients.values(), *(moment for *_, moment in moments)):
                local(tensor).record_stream(torch.cuda.current_stream())
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for state, name, moment in moments:
            state[name] = moment

    def _store(self, gradients: dict[nn.Parameter, Tensor], optimizers: list[Optimizer]) -> None:
        for parameter, state, name, moment in self._moments(gradients, optimizers):
            state[name] = self._to_host(parameter, name, moment)

    def _moments(
        self, gradients: dict[nn.Parameter, Tensor], optimizers: list[Optimizer]
    ) -> Iterator[tuple[nn.Parameter, dict[str, Any], str, Tensor]]:
        for optimizer in optimizers:
            for parameter in gradients:
                if parameter in self._away and parameter in optimizer.state:
                    state = optimizer.state[parameter]
                    for name, moment in list(state.items()):
                        if moment.ndim:  # a count of steps stays where its optimizer wants it
                            yield parameter, state, name, moment

    def _to_host(self, parameter: nn.Parameter, name: str, tensor: Tensor) -> Tensor:
        key = (parameter, name)
        if key not in self._kept:
            self._kept[key] = torch.empty_like(tensor, device="cpu", pin_memory=self.side is not None)
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())
            local(tensor).record_stream(self.side)
        with self._beside():
            self._kept[key].copy_(tensor, non_blocking=True)
        return self._kept[key]

    def _to_device(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.device, pin_memory=False).copy_(tensor, non_blocking=True)

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.side) if self.side is not None else nullcontext()
