"""Requirements of a training run: memory of a process, time of a step, energy and cost.

A plan is the quickest layout that fits the memory of the accelerators; where none fits, as little as possible is
offloaded to the host's memory, the least often used state first: optimizer states layer by layer, then gradients, then
parameters (granular CPU offload, M6-10T, arXiv 2110.03888). Nothing is offloaded where any layout fits without."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from openm6.core.energy import carbon_intensity
from openm6.core.errors import OpenM6Error, UsageError
from openm6.model import ModelConfig
from openm6.model.files import layer_of, meta_model
from openm6.model.roles import role_of
from openm6.plan.footprint import (
    Activations,
    Layout,
    States,
    Weight,
    Work,
    activations,
    buffers,
    image_bytes,
    places,
    states_by_layer,
    states_of,
    weights_of,
)
from openm6.plan.steptime import Machine, StepTime, step_time
from openm6.train.distributed import Group, local
from openm6.train.offload import Offload
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection

GIB = 2**30

LARGEST = 16_384
"""Largest number of accelerators tried."""

RESERVED = 0.06
"""Fraction of an accelerator's memory taken by driver, libraries and fragmentation."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Fixed parts of the layout; None: the planner's choice."""

    sharding: str | None = None
    experts: int | None = None
    recompute: str | None = None
    offload: Offload | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest process: `host` in the memory of its host, all else on its accelerator; `visit` while layers
    are updated, when activations and buffers are gone."""

    states: States
    activations: Activations
    buffers: int
    visit: int
    host: States

    @property
    def total(self) -> int:
        """Bytes on the accelerator."""
        return self.states.total + max(self.activations.peak + self.buffers, self.visit)


@dataclass(frozen=True, slots=True)
class Run:
    """A budget of positions ("tokens"), worked through by the whole machine."""

    tokens: float
    steps: int
    days: float
    kwh: float
    co2e_kg: float
    cost: float


@dataclass(frozen=True, slots=True)
class Plan:
    parameters: int
    layout: Layout
    memory: Memory
    usable: int
    time: StepTime
    tokens_per_step: int
    run: Run | None
    assumptions: list[str]


@dataclass(frozen=True, slots=True)
class _Case:
    """The inputs common to all layouts; `images`: bytes kept by the image embedder."""

    config: ModelConfig
    weights: list[Weight]
    machine: Machine
    work: Work
    optimizer: str
    low: int
    images: int


def make_plan(
    config: ModelConfig,
    machine: Machine,
    work: Work,
    optimizer: str = "adamw",
    low: int = 2,
    fixed: Fixed | None = None,
    tokens: float | None = None,
    dry: bool = False,
) -> Plan:
    """The quickest layout that fits. `low`: bytes of a number in products. `dry`: the states' bytes are read off the
    shards of a dry run. Raises OpenM6Error when nothing fits."""
    fixed, weights = fixed or Fixed(), weights_of(meta_model(config))
    case = _Case(config, weights, machine, work, optimizer, low, image_bytes(config, work, low))
    fitting: list[tuple[Layout, Memory, StepTime]] = []
    short: list[tuple[int, str, Layout]] = []
    for layout, memory, by_layer in _smallest(case, fixed):
        lacking = _lacking(memory, machine)
        if lacking[0] > 0:
            short.append((*lacking, layout))
            continue
        time = step_time(config, weights, layout, machine, work, low, places(by_layer, layout.offload))
        fitting.append((layout, memory, time))
    if not fitting and not short:
        raise UsageError(_impossible(case, fixed))
    if not fitting:
        missing, where, layout = min(short, key=lambda entry: entry[0])
        instead = "; ".join(_that_fit(case, fixed)) or "neither fewer rows nor more accelerators alone"
        raise OpenM6Error(
            f"Nothing fits {machine.gpus} x {machine.hardware.memory:g} GiB: the nearest layout ({describe(layout)}) "
            f"is short of {missing:,} bytes ({missing / GIB:.1f} GiB) in {where}. What fits: {instead}."
        )
    layout, memory, time = min(fitting, key=lambda fit: (fit[0].offload.layers > 0, fit[2].total))
    if dry:
        memory = _memory(case, layout, dry_run(config, layout, optimizer), memory.activations)
    tokens_per_step = work.positions * work.micro_batches * machine.gpus
    run = None if tokens is None else _run(tokens, tokens_per_step, time, machine)
    assumed = list(_assumptions(case, dry))
    total = sum(w.numel for w in weights)
    return Plan(total, layout, memory, usable(machine), time, tokens_per_step, run, assumed)


def usable(machine: Machine) -> int:
    """Bytes of one accelerator's memory that a run can have."""
    return int(machine.hardware.memory * GIB * (1 - RESERVED))


def describe(layout: Layout) -> str:
    away = layout.offload
    return (
        f"sharding {layout.sharding}, experts over {layout.experts}, recompute {layout.recompute}, on the host "
        f"optimizer states of {away.optimizer}, gradients of {away.gradients}, parameters of {away.parameters} layers"
    )


def _smallest(case: _Case, fixed: Fixed) -> Iterator[tuple[Layout, Memory, dict[int | None, States]]]:
    """Every layout with the least offload that fits, its bytes, and its states by layer."""
    most = case.config.distinct_layers or case.config.num_hidden_layers
    for tried in _layouts(case, fixed):
        by_layer = states_by_layer(case.weights, tried, case.optimizer)
        yield *_smallest_offload(case, tried, by_layer, _dials(tried, most, fixed.offload)), by_layer


def _lacking(memory: Memory, machine: Machine) -> tuple[int, str]:
    """Bytes that are missing, at most 0 where it fits, and where."""
    return max(
        (memory.total - usable(machine), "the memory of each accelerator"),
        (memory.host.total - int(machine.hardware.host_memory * GIB), "the host's memory for each accelerator"),
    )


def _that_fit(case: _Case, fixed: Fixed) -> Iterator[str]:
    """The nearest plans that fit, each with one change: nothing fixed, more memory of the host, fewer rows, more
    accelerators."""

    def fit(free: Fixed = fixed, **changes: Any) -> tuple[Layout, Memory] | None:
        other = replace(case, **changes)
        found = ((x, memory) for x, memory, _ in _smallest(other, free) if _lacking(memory, other.machine)[0] <= 0)
        return next(found, None)

    machine, work = case.machine, case.work
    if fixed != Fixed() and (found := fit(Fixed())):
        yield f"the same machine with nothing fixed ({describe(found[0])})"
    roomy = replace(machine, hardware=replace(machine.hardware, host_memory=2.0**20))
    if found := fit(machine=roomy):
        yield f"the same with --host-memory {math.ceil(found[1].host.total / GIB)}"
    rows = work.rows // 2
    while rows and not (found := fit(work=replace(work, rows=rows))):
        rows //= 2
    if rows:
        yield f"the same with --rows {rows}"
    if (gpus := _enough(lambda number: bool(fit(machine=replace(machine, gpus=number))), machine)) is not None:
        yield f"--gpus {gpus} of the same kind"


def _enough(fits: Callable[[int], bool], machine: Machine) -> int | None:
    """The fewest accelerators that fit, in whole hosts where there are several, or in sixteenths of the way where that
    is coarser; None where LARGEST do not."""
    host, low, high = max(1, machine.hardware.per_host), machine.gpus, machine.gpus * 2
    while not fits(high):
        low, high = high, high * 2
        if high > LARGEST:
            return None
    step = 1 if high <= host else host * max(1, (high - low) // (16 * host))
    return next((number for number in range(low - low % step + step, high, step) if fits(number)), high)


def _layouts(case: _Case, fixed: Fixed) -> Iterator[Layout]:
    """All layouts of train/parallel.py, without offload."""
    gpus = case.machine.gpus
    common = math.gcd(case.config.num_experts, gpus) if case.config.num_experts else 1
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    for sharding, experts, recompute in product(
        ("none", "zero2", "zero3") if gpus > 1 else ("none",), divisors, ("none", "selective", "full")
    ):
        given = ((fixed.sharding, sharding), (fixed.experts, experts), (fixed.recompute, recompute))
        if any(wanted not in (None, this) for wanted, this in given):
            continue
        if sharding != "none" or (experts == 1 and not (fixed.offload and fixed.offload.layers)):
            yield Layout(gpus, sharding, experts, recompute)


def _dials(layout: Layout, layers: int, fixed: Offload | None) -> list[Offload]:
    """Offloads to try, from nothing to everything."""
    if fixed is not None:
        return [Offload(*(min(n, layers) for n in (fixed.parameters, fixed.gradients, fixed.optimizer)))]
    if layout.sharding == "none":
        return [Offload()]
    return [
        *(Offload(0, 0, n) for n in range(layers + 1)),
        *(Offload(0, n, layers) for n in range(1, layers + 1)),
        *(Offload(n, layers, layers) for n in range(1, layers + 1)),
    ]


def _smallest_offload(
    case: _Case, layout: Layout, by_layer: dict[int | None, States], dials: list[Offload]
) -> tuple[Layout, Memory]:
    """The layout with the first of the dials that fits (the last one, when none does), and its bytes."""
    active = activations(case.config, layout, case.work, case.low, case.machine.gpu, case.images)

    def bytes_of(dial: Offload) -> Memory:
        return _memory(case, replace(layout, offload=dial), by_layer, active)

    # A layer that leaves frees at least what its visit needs: the later dials never need more.
    first = bisect_left(dials, True, key=lambda dial: bytes_of(dial).total <= usable(case.machine))
    dial = dials[min(first, len(dials) - 1)]
    return replace(layout, offload=dial), bytes_of(dial)


def _memory(case: _Case, layout: Layout, by_layer: dict[int | None, States], active: Activations) -> Memory:
    place = places(by_layer, layout.offload)
    more = buffers(case.config, case.weights, layout, case.work, case.low, case.machine.gpu)
    return Memory(place.device, active, more, place.visit, place.host)


def _run(tokens: float, tokens_per_step: int, time: StepTime, machine: Machine) -> Run:
    steps = math.ceil(tokens / tokens_per_step)
    hours = steps * time.total / 3600
    kwh = machine.gpus * machine.hardware.power / 1000 * hours * machine.pue
    cost = machine.gpus * machine.hardware.price * hours
    return Run(tokens, steps, hours / 24, kwh, kwh * carbon_intensity(machine.country), cost)


def _assumptions(case: _Case, dry: bool) -> Iterator[str]:
    machine, hardware, work = case.machine, case.machine.hardware, case.work
    where = "read off the shards of a dry run" if dry else "computed from the shapes"
    yield f"parameters, gradients and optimizer states ({case.optimizer}) are {where}; master weights are fp32"
    yield (
        f"a process takes {work.rows} rows of {work.length} positions, {work.labels} with a label, "
        f"{work.micro_batches} times a step"
    )
    yield f"products in {8 * case.low} bits reach {machine.achieved:.0%} of {hardware.peak / 1e12:g} TFLOP/s"
    yield f"memory moves {hardware.bandwidth / 1e9:g} GB/s; {machine.between / 1e9:g} GB/s one way between processes"
    yield f"{machine.overlap:.0%} of communication runs beside products"
    yield f"{RESERVED:.0%} of {hardware.memory:g} GiB is left to driver, libraries and fragments"
    kind = "FlexAttention" if machine.gpu else "plain attention, which keeps its probabilities"
    both = ", and all of a bidirectional source" if work.labels < work.positions else ""
    yield f"{kind}; a query sees half of its row on average{both if case.config.source == 'bidirectional' else ''}"
    if case.config.num_experts:
        yield "experts are loaded evenly"
    if work.images:
        yield f"{work.images} positions of a row are patches of pictures; the FLOPs of their embedder are left out"
    yield f"host: {hardware.host_link / 1e9:g} GB/s to it, its memory moves {hardware.host_bandwidth / 1e9:g} GB/s"
    carbon = 1000 * carbon_intensity(machine.country)
    yield f"{hardware.power:g} W and ${hardware.price:g} an hour each, PUE {machine.pue:g}"
    yield f"{carbon:.0f} g CO2e a kWh ({machine.country}, by codecarbon's table)"


def _impossible(case: _Case, fixed: Fixed) -> str:
    names = ("sharding", "experts", "recompute", "offload")
    asked = ", ".join(f"{name} {getattr(fixed, name)}" for name in names if getattr(fixed, name) is not None)
    return (
        f"No layout over {case.machine.gpus} processes has {asked}: sharding needs two processes, experts over more "
        f"than one and offload need sharding, and the number that share experts has to divide both the processes and "
        f"the experts ({case.config.num_experts})."
    )


@contextmanager
def fake_group(world: int) -> Iterator[Group]:
    """Process 0 of `world`, the others imagined: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise OpenM6Error("A dry run has to be alone: this process belongs to a group already.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Group(0, world, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def dry_run(config: ModelConfig, layout: Layout, optimizer: str) -> dict[int | None, States]:
    """Bytes of process 0 by distinct layer (None: outside of the blocks), read off the shards that train/parallel.py
    makes; the fullest, because what does not divide evenly falls on the first processes."""
    settings = ParallelSection.model_validate(
        {"sharding": layout.sharding, "experts": layout.experts, "recompute": layout.recompute}
    )
    model = meta_model(config)
    if layout.sharding == "none":  # every process holds everything
        return _read(model, optimizer)
    with fake_group(layout.world) as group:
        Parallel(model, settings, group, torch.bfloat16)
        return _read(model, optimizer)


def _read(model: torch.nn.Module, optimizer: str) -> dict[int | None, States]:
    found: dict[int | None, States] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        found[layer] = found.get(layer, States()) + states_of(
            role_of(model, name), tuple(local(parameter).shape), optimizer
        )
    return found
