"""openm6 plan."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openm6.cli.app import app
from openm6.cli.checks import check_parts, refuse_idle
from openm6.cli.options import Json
from openm6.cli.output import emit, pairs, table, tell
from openm6.core.errors import UsageError, suggest
from openm6.core.units import size_of
from openm6.model.presets import find_preset, presets
from openm6.plan.hardware import Hardware, hardware as known

if TYPE_CHECKING:
    from openm6.model import ModelConfig
    from openm6.plan.footprint import Work
    from openm6.plan.planner import Plan
    from openm6.train.offload import Offload
    from openm6.train.recipe import AnyRecipe


@app.command()
def plan(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="Preset, e.g. m6-10b, or recipe by name or path.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the recipe as for `openm6 train`, e.g. train.steps=500.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of accelerators. Default for a preset: 8.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="v100-32g, a100-40g, a100-80g, h100, h200 or cpu. Default for a preset: a100-80g. A recipe without "
            "--gpus and --hardware is timed on this machine."
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory per accelerator: 80GB, 74.5GiB, or a number of GiB.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory per accelerator, for offload: 256GB, or a number of GiB.")
    ] = None,
    interconnect: Annotated[
        str | None, typer.Option(help="One-way bandwidth between accelerators: 25GB/s, or a number of GB/s.")
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option("--machine", "-m", help="Other hardware figure, e.g. price=2 or power=250; repeatable."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows per process and micro-batch. Default for a preset: 8.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Row length in positions.")] = None,
    images: Annotated[int, typer.Option(min=0, help="Positions per row that hold image patches.")] = 0,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Micro-batches per step.")] = None,
    optimizer: Annotated[
        Literal["adamw", "muon", "adafactor", "adam8bit"] | None,
        typer.Option(help="Optimizer. Default for a preset: adamw."),
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the matmuls.")] = "bf16",
    distinct_layers: Annotated[
        int | None, typer.Option(min=1, help="Distinct layers shared by all (Pseudo stage of Pseudo-to-Real).")
    ] = None,
    sharding: Annotated[Literal["none", "zero2", "zero3"] | None, typer.Option(help="Force this sharding.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Force this degree of expert parallelism.")] = None,
    recompute: Annotated[
        Literal["none", "selective", "full"] | None, typer.Option(help="Force this activation recomputation.")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(help="Force CPU offload of these layers' states: 12, or optimizer=24,gradients=6."),
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Training budget in positions, e.g. 1e11.")] = None,
    achieved: Annotated[float, typer.Option(min=0.01, max=1, help="Fraction of peak FLOP/s reached by matmuls.")] = 0.4,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Fraction of communication hidden by compute.")] = 0.5,
    pue: Annotated[float, typer.Option(min=1, help="Power usage effectiveness of the site.")] = 1.2,
    country: Annotated[str, typer.Option(help="Country of the electricity mix, three-letter ISO code.")] = "CHN",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build the shards on the meta device and count their bytes.")
    ] = False,
    json: Json = False,
) -> None:
    """Estimate memory, time, energy and cost of a training run. Exit code 1 if no layout fits.

    For a recipe alone, measure the training time on this machine: `openm6 plan try_on`"""
    from openm6.train.recipe import load_recipe

    if not _is_recipe(preset):
        if overrides:
            raise UsageError(f"{overrides[0]} overrides a recipe, and {preset} is not a recipe.")
        find_preset(preset)
    else:
        recipe = load_recipe(preset, overrides or [])
        if gpus is None and hardware is None:
            refuse_idle(
                context, ("preset", "overrides", "json"),
                "a recipe alone is timed on this machine; give --gpus or --hardware too.",
            )  # fmt: skip
            _time(recipe, json)
            return
    gpus, hardware = gpus or 8, hardware or "a100-80g"
    speed = None if interconnect is None else _figure("--interconnect", "link", interconnect, 1e9)
    changes = {
        "memory": None if gpu_memory is None else _figure("--gpu-memory", "memory", gpu_memory),
        "host_memory": None if host_memory is None else _figure("--host-memory", "host_memory", host_memory),
        "link": speed, "network": speed,
    }  # fmt: skip
    figures = _changed(known(hardware), changes, machine or [])

    from openm6.model import ModelConfig
    from openm6.plan.footprint import Work
    from openm6.plan.planner import Fixed, make_plan
    from openm6.plan.steptime import Machine

    if not _is_recipe(preset):
        config = ModelConfig.preset(preset)
        work, usual = Work(8, min(512, config.max_position_embeddings)), "adamw"
    else:
        config, work, usual, budget = _of_recipe(recipe, preset, gpus)
        tokens = tokens or budget
    if distinct_layers:
        config = type(config)(**{**config.to_dict(), "distinct_layers": distinct_layers})
    given = {"rows": rows, "length": length, "micro_batches": accumulate, "images": images or None}
    work = replace(work, **{key: value for key, value in given.items() if value is not None})
    if config.positions == "learned" and work.length > config.max_position_embeddings:
        raise UsageError(f"--length is {work.length}; this model has {config.max_position_embeddings} positions.")
    if work.images > work.length:
        raise UsageError(f"--images is {work.images}, more than the {work.length} positions of a row.")
    found = make_plan(
        config, Machine(gpus, figures, hardware != "cpu", achieved, overlap, pue, country), work, optimizer or usual,
        2 if precision == "bf16" else 4, Fixed(sharding, experts, recompute, _offload(offload)), tokens, dry_run,
    )  # fmt: skip
    if json:
        content = asdict(found)
        content["memory"]["total"], content["time"]["total"] = found.memory.total, found.time.total
        emit(content)
    else:
        _print(found, preset, f"{gpus} x {hardware}")


def _offload(text: str | None) -> Offload | None:
    from openm6.train.offload import Offload

    if text is None:
        return None
    try:
        if text.isdecimal():
            return Offload(*[int(text)] * 3)
        found = Offload(**{name: int(value) for name, value in pairs(text.split(",")).items()})
    except (TypeError, ValueError):
        raise UsageError(
            f"--offload is {text!r}: give a number of layers, or one for each of optimizer, gradients and parameters, "
            "e.g. optimizer=24,gradients=6."
        ) from None
    if not 0 <= found.parameters <= min(found.gradients, found.optimizer):
        raise UsageError("--offload: a layer with offloaded parameters needs offloaded gradients and moments too.")
    return found


def _is_recipe(name: str) -> bool:
    """True for the path or name of a recipe; a name that is also a preset is the preset."""
    from openm6.train.recipe import find_recipe

    if name in presets() or Path(name).suffix in (".yaml", ".yml"):
        return name not in presets()
    try:
        find_recipe(name)
    except UsageError:
        return False
    return True


def _time(recipe: AnyRecipe, json: bool) -> None:
    """Print the training time of a recipe on this machine, extrapolated from its first steps."""
    check_parts(recipe)

    import torch

    from openm6.train.trainer import seconds_per_step

    steps, step = recipe.train.steps, seconds_per_step(recipe)
    cpu = f"a CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    figures = {"steps": steps, "seconds_per_step": step, "seconds": steps * step}
    text = f"{recipe.name} on this machine ({machine}): {steps:,} steps of {step:.2f} s, about "
    text += f"{timedelta(seconds=round(steps * step))}, without evaluations and checkpoints."
    tell(json, {"recipe": recipe.name, "machine": machine, **figures}, text)


def _of_recipe(recipe: AnyRecipe, path: str, gpus: int) -> tuple[ModelConfig, Work, str, float]:
    """Config, work, optimizer and token budget of a recipe. An upper bound: every example fills a row, and the
    vocabulary is the largest that the tokenizer can have."""
    from openm6.model import ModelConfig
    from openm6.model.files import read_config
    from openm6.plan.footprint import Work
    from openm6.train.recipe import Recipe

    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"{path} trains an image codec, which is not sharded: without --gpus and --hardware its first steps are "
            "timed on this machine."
        )
    if recipe.model.path:
        config = replace(read_config(recipe.model.path), **recipe.model.sizes)
    else:
        ids = recipe.tokenizer.vocab_size + recipe.tokenizer.num_codes
        config = ModelConfig.preset(recipe.model.preset or "", **{"vocab_size": ids, **recipe.model.sizes})
    settings = recipe.train
    rows = -(-settings.batch_size // (gpus * settings.accumulate))
    budget = float(settings.steps * settings.batch_size * settings.row_length)
    return config, Work(rows, settings.row_length, micro_batches=settings.accumulate), settings.optimizer, budget


def _changed(hardware: Hardware, changes: dict[str, Any], more: list[str]) -> Hardware:
    names = [field.name for field in fields(hardware)]
    for name, value in pairs(more).items():
        if name not in names:
            raise UsageError(f"Hardware has no figure {name}.{suggest(name, names)} Known: {', '.join(names)}.")
        changes[name] = _figure(f"The figure {name}", name, value)
    return replace(hardware, **{name: value for name, value in changes.items() if value is not None})


def _figure(label: str, name: str, text: str, plain: float = 1.0) -> float:
    """A hardware figure in its own unit: a memory may be 80GB, a rate 25GB/s (`plain`: bytes per second of one unit of
    a rate without a unit)."""
    example = ""
    try:
        if name in ("memory", "host_memory"):
            example = " of GiB, or a size such as 80GB"
            return size_of(text, 2**30) / 2**30
        if name in ("bandwidth", "link", "network", "host_link", "host_bandwidth"):
            example = " above 0, or a rate such as 25GB/s"
            value = size_of(text.strip().removesuffix("/s"), plain)
        else:
            value = int(text) if name == "per_host" else float(text)
        if value > 0 or (value == 0 and name in ("power", "price")):
            return value
    except ValueError:
        pass
    raise UsageError(f"{label} has to be a number{example}, not {text!r}.")


def _print(found: Plan, name: str, machine: str) -> None:
    layout, memory, time, run = found.layout, found.memory, found.time, found.run
    typer.echo(f"{name}, {found.parameters:,} parameters, on {machine}")
    table(["layout", ""], [
        ("data-parallel processes", layout.world),
        ("parallel.experts", f"{layout.experts} (each shard on {layout.data})"),
        ("parallel.sharding", layout.sharding), ("parallel.recompute", layout.recompute),
        *((f"layers with offloaded {what}", number) for what, number in (
            ("optimizer states", layout.offload.optimizer), ("gradients", layout.offload.gradients),
            ("parameters", layout.offload.parameters),
        ) if number),
    ])  # fmt: skip
    table(["peak memory per process", "GiB", "bytes"], [
        (what, f"{size / 2**30:.2f}", f"{size:,}") for what, size in (
            ("parameters", memory.states.parameters), ("gradients", memory.states.gradients),
            ("optimizer", memory.states.optimizer), ("activations", memory.activations.peak),
            ("communication buffers", memory.buffers), ("or offloaded states during their update", memory.visit),
            ("total", memory.total), ("usable", found.usable),
            ("host memory", memory.host.total),
        )
    ])  # fmt: skip
    table(["time per step", "seconds"], [
        (what, f"{seconds:.4f}") for what, seconds in (
            ("matmuls", time.products), ("memory traffic of the passes", time.traffic),
            ("all-gather", time.gather), ("reduce-scatter", time.reduce), ("all-to-all", time.exchange),
            ("offload", time.offload), ("optimizer", time.update), ("waiting for links", time.waiting),
            ("total", time.total),
        )
    ])  # fmt: skip
    typer.echo(f"{found.tokens_per_step / time.total:,.0f} positions per second")
    if run:
        table(["run", ""], [
            ("positions", f"{run.tokens:.3g}"), ("steps", f"{run.steps:,}"), ("days", f"{run.days:.2f}"),
            ("kWh", f"{run.kwh:,.0f}"), ("kg CO2e", f"{run.co2e_kg:,.0f}"), ("cost", f"${run.cost:,.0f}"),
        ])  # fmt: skip
    typer.echo("Assumed: " + "; ".join(found.assumptions) + ".")
