"""Duration of a training step, from FLOPs, memory traffic and communication."""

from __future__ import annotations

from dataclasses import dataclass, replace

from openm6.model import ModelConfig
from openm6.model.count import count_parameters, training_flops
from openm6.plan.footprint import Layout, Places, States, Weight, Work, activations, gathered
from openm6.plan.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpus` accelerators, and what is assumed of them.

    gpu        False: CPUs, whose attention keeps its probabilities
    achieved   fraction of the peak that products reach
    overlap    fraction of communication that overlaps with products
    pue        energy of the whole site / energy of the accelerators
    country    whose electricity is used, ISO code of three letters
    """

    gpus: int
    hardware: Hardware
    gpu: bool = True
    achieved: float = 0.4
    overlap: float = 0.5
    pue: float = 1.2
    country: str = "CHN"

    @property
    def between(self) -> float:
        """Bytes/s one way of the slowest link that all accelerators share."""
        return self.hardware.link if self.gpus <= self.hardware.per_host else self.hardware.network


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step.

    products, traffic   forward and backward: matrix products; reading weights, writing and reading activations
    gather, reduce      weights from their shards, gradients into them
    exchange            rows to experts and back
    offload             weights from the host's memory, gradients into it
    update              the optimizer's, and the way of what visits for it
    waiting             for the links: what does not run beside the passes
    """

    products: float
    traffic: float
    gather: float
    reduce: float
    exchange: float
    offload: float
    update: float
    waiting: float

    @property
    def passes(self) -> float:
        """Products and memory work side by side: the longer of both."""
        return max(self.products, self.traffic)

    @property
    def total(self) -> float:
        return self.passes + self.waiting + self.update


def step_time(
    config: ModelConfig,
    weights: list[Weight],
    layout: Layout,
    machine: Machine,
    work: Work,
    low: int,
    places: Places,
) -> StepTime:
    """The step time of one process, with equal work on all."""
    hardware, world, between = machine.hardware, layout.world, machine.between
    micro_batches = work.micro_batches
    products = (
        micro_batches * step_flops(config, layout.recompute, work, machine.gpu) / (hardware.peak * machine.achieved)
    )
    elements = gathered(weights, layout)
    rest = elements.pop(None)
    applied = sum(elements[n % len(elements)] for n in range(config.num_hidden_layers))
    # Weights are read forward and for both gradients, activations written and read; what is recomputed, once more.
    kept = activations(config, replace(layout, recompute="none"), work, low, machine.gpu).saved
    full, again = layout.recompute == "full", layout.recompute != "none"
    traffic = micro_batches * ((3 + full) * low * applied + (2 + again) * kept) / hardware.bandwidth

    layers, outside = _crossing(weights, layout), rest * (world - 1) / world
    if layout.sharding == "none":  # an all-reduce sends twice what a reduce-scatter does
        times, gather, reduce = 0, 0.0, 8 * (layers + outside) / between
    else:
        times = 2 if layout.sharding == "zero3" else 1  # zero3 lets go after the forward pass
        layers *= config.num_hidden_layers / len(elements)  # a shared one each time that it is applied
        gather = micro_batches * (times * low * layers + 4 * outside) / between
        reduce = 4 * (layers + outside) / between
    rows = config.experts_per_token * work.positions * (1 - 1 / layout.experts)
    journeys = len(config.expert_layers()) * (6 if again else 4)  # there and back: forward, backward, recomputed
    exchange = micro_batches * journeys * low * config.hidden_size * rows / between
    resident, guest = places.resident, places.guest
    offload = (micro_batches * times * resident.parameters + resident.gradients + guest.gradients) / hardware.host_link
    update = _touched(places.device) / hardware.bandwidth + _touched(resident) / hardware.host_bandwidth
    # Guests come while those of the layer before leave; what the update itself takes is little beside that.
    update += (guest.gradients + guest.optimizer) / hardware.host_link
    # The links between accelerators and those to the host are different ones.
    passes = max(products, traffic)
    waiting = sum(t - min(machine.overlap * t, passes) for t in (gather + reduce + exchange, offload))
    return StepTime(products, traffic, gather, reduce, exchange, offload, update, waiting)


def step_flops(config: ModelConfig, recompute: str, work: Work, gpu: bool) -> float:
    """FLOPs of a micro-batch: `training_flops`, and the recomputed part of the forward pass, which is a third of it."""
    positions, source = work.positions, 0
    if config.source == "bidirectional":  # the positions without a label
        source = work.length - work.labels // work.rows
    pairs = work.rows * (work.length**2 + source**2) // 2
    flops = training_flops(config, positions, pairs, work.labels)
    if recompute == "none" or (recompute == "selective" and gpu):
        return flops
    layers = training_flops(config, positions, pairs, 0)
    if recompute == "full":
        return flops + layers / 3
    # On a CPU attention's own products and the experts' write into memory that they have, and are not kept.
    attention = layers - training_flops(config, positions, pairs=0, trained=0)
    experts = 6 * count_parameters(config)["experts"] * config.experts_per_token / max(1, config.num_experts)
    experts *= config.num_hidden_layers / (config.distinct_layers or config.num_hidden_layers) * positions
    return flops + (attention + experts) / 3


def _crossing(weights: list[Weight], layout: Layout) -> float:
    """Elements of the distinct layers that reach a process from others."""
    total = 0.0
    for weight in weights:
        if weight.layer is not None:
            spread = weight.expert and layout.experts > 1
            processes = layout.data if spread else layout.world
            total += weight.numel / (layout.experts if spread else 1) * (processes - 1) / processes
    return total


def _touched(states: States) -> int:
    """Bytes read and written by the optimizer."""
    return 2 * states.parameters + states.gradients + 2 * states.optimizer
