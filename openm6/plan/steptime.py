"""The accelerators that the planner knows, and the duration of a training step on them, from FLOPs, memory traffic and
communication."""

from __future__ import annotations

from dataclasses import dataclass, replace

from openm6.core.errors import UsageError, suggest
from openm6.model import ModelConfig
from openm6.model.count import count_parameters, training_flops
from openm6.plan.footprint import Layout, Places, States, Weight, Work, activations, gathered


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator and its part of its host.

    memory, host_memory         GiB
    peak                        dense FLOP/s of matrix products in 16 bits (V100: fp16; cpu: fp32)
    bandwidth                   bytes/s of its memory
    host_bandwidth              bytes/s of the host's memory, its share
    link, network, host_link    bytes/s one way to its neighbours in the host, to other hosts, to the host's memory
    per_host                    accelerators per host
    power                       W, board power of the data sheet: an upper bound of the accelerator alone
    price                       $ per hour
    """

    memory: float
    peak: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    host_bandwidth: float
    host_memory: float
    per_host: int
    power: float
    price: float


# Memory, peak, bandwidth, NVLink (half of the figure for both ways), PCIe and power: NVIDIA's data sheets of the SXM
# forms of "V100" (2020), "A100" (2021), "H100" (2023), "H200" (2024). Hosts and networks: the guides of DGX-2 (1.5 TB
# of memory and 8 x 100 Gb/s for 16), DGX A100 (1 or 2 TB, 8 x 200 Gb/s for 8), DGX H100 and H200 (2 TB, 8 x 400 Gb/s
# for 8); host bandwidth is that of their processors' memory channels, divided among the accelerators. Usable PCIe
# rates are four fifths of the nominal ones. Prices are about those of Amazon EC2 on demand in 2025 (p3, p4d, p4de, p5,
# p5en, an eighth of a host); capacity reserved by the day was offered for 45% to 70% of that (A100 $1.84, H100 $4.92,
# H200 $5.41, EC2 Capacity Blocks, end of 2024). "cpu" is a small server's two cores, by measurement.
HARDWARE = {
    "v100-32g": Hardware(32, 125e12, 0.9e12, 150e9, 6.25e9, 12.5e9, 16e9, 96, 16, 300, 3.06),
    "a100-40g": Hardware(40, 312e12, 1.555e12, 300e9, 25e9, 25e9, 51e9, 128, 8, 400, 4.10),
    "a100-80g": Hardware(80, 312e12, 2.039e12, 300e9, 25e9, 25e9, 51e9, 256, 8, 400, 5.12),
    "h100": Hardware(80, 989e12, 3.35e12, 450e9, 50e9, 50e9, 76e9, 256, 8, 700, 6.88),
    "h200": Hardware(141, 989e12, 4.8e12, 450e9, 50e9, 50e9, 76e9, 256, 8, 700, 7.90),
    "cpu": Hardware(8, 0.17e12, 20e9, 5e9, 1e9, 20e9, 20e9, 0, 1, 30, 0.05),
}


def hardware(name: str) -> Hardware:
    if name not in HARDWARE:
        known = tuple(HARDWARE)
        raise UsageError(f'There is no hardware "{name}".{suggest(name, known)} Known: {", ".join(known)}.')
    return HARDWARE[name]


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
    positions, pairs = work.positions, work.rows * work.length**2 // 2
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
