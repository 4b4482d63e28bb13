"""openm6 models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs, find
from openm6.cli.output import Json, emit, pairs, table
from openm6.core.bases import base_of
from openm6.core.errors import UsageError
from openm6.core.files import require_new

if TYPE_CHECKING:
    from openm6.hub.catalogue import Version
    from openm6.model import ModelConfig

models = typer.Typer(help="Model directories, and the catalogue of models.", no_args_is_help=True)
app.add_typer(models, name="models")


@models.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(help="Directory of a Qwen3 or Qwen3-MoE text checkpoint (config.json, safetensors, tokenizer)."),
    ],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    image_embedder: Annotated[str, typer.Option(help="stem, patch, resnet or none; starts at random.")] = "stem",
    num_codes: Annotated[int, typer.Option(min=0, help="Ids reserved for image codes.")] = 1024,
    max_length: Annotated[int, typer.Option(min=8, help="Longest example in positions.")] = 1024,
    json: Json = False,
) -> None:
    """Make the backbone of a Qwen3 checkpoint: same weights, new tokens behind the old ones, pictures in."""
    require_new(output)
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} is no checkpoint: it has no config.json.")

    from openm6.compress.convert import import_model

    _tell(output, import_model(path, output, image_embedder, num_codes, max_length).model.config, json)


@models.command()
def merge(
    adapter: Annotated[
        str, typer.Argument(help="An adapter, what a recipe with `adapt` trains: its directory, or of the catalogue.")
    ],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    json: Json = False,
) -> None:
    """Make an adapter and the model beneath it one model directory."""
    require_new(output)
    place = find(adapter)
    if base_of(place) is None:
        raise UsageError(f"{adapter} is no adapter: it has no adapter_config.json.")

    from openm6.core.files import write_whole
    from openm6.inference.session import Session
    from openm6.model.adapters import check_mergeable

    check_mergeable(place)
    session = Session.load(place, "cpu", trainable=True)
    write_whole(output, session.save)
    _tell(output, session.model.config, json)


@models.command()
def upcycle(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    num_experts: Annotated[int, typer.Option(min=2, help="Experts a layer, each a copy of its feed-forward.")],
    experts_per_token: Annotated[int, typer.Option(min=2, help="Experts that see a token.")] = 2,
    router: Annotated[str, typer.Option(help="topk, prototype or grouped.")] = "topk",
    expert_interval: Annotated[int, typer.Option(min=1, help="Experts in every n-th layer.")] = 1,
    json: Json = False,
) -> None:
    """Make a dense model one of experts that answers the same; training on lets them part."""
    require_new(output)
    place = find(model)

    from openm6.compress.convert import upcycle_model

    made = upcycle_model(place, output, num_experts, experts_per_token, router, expert_interval)
    _tell(output, made.model.config, json)


@models.command()
def prune(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    task: Annotated[str, typer.Option(help="A task that it has to go on answering.")],
    data: Annotated[str, typer.Option(help="Records of the task, with answers.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Layers that stay.")] = None,
    key_value_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of keys and values that stay, with the queries' of each.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Units of a dense feed-forward that stay.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of a layer that stay.")] = None,
    records: Annotated[int, typer.Option(min=1, help="Records to look at, the first ones.")] = 256,
    column: Annotated[list[str] | None, typer.Option("--column", "-c", help="slot=column, when names differ.")] = None,
    json: Json = False,
) -> None:
    """Make a model smaller: what the data need the least is left out. Training on mends what that costs, from the
    larger one as a teacher (`openm6 finetune --teacher`)."""
    require_new(output)
    place, columns = check_inputs(model, [task], [data]), pairs(column or [])

    from openm6.compress.convert import prune_model

    made = prune_model(
        place, output, task, data, columns, records, layers=layers, key_value_heads=key_value_heads,
        width=width, experts=experts,
    )  # fmt: skip
    _tell(output, made.model.config, json)


@models.command()
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    bits: Annotated[int, typer.Option(help="Of a weight: 8, or 4.")] = 8,
    json: Json = False,
) -> None:
    """Round a model's weights to 8 or 4 bits: a smaller file, and on a CPU (8) shorter answers."""
    require_new(output)
    place = find(model)

    from openm6.compress.convert import quantize_model

    _tell(output, quantize_model(place, output, bits).model.config, json)


@models.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    bits: Annotated[int | None, typer.Option(help="Of a weight: 8, or 4; else 32.")] = None,
    json: Json = False,
) -> None:
    """Write a model as ONNX, with a program that asks it without PyTorch."""
    require_new(output)
    place = find(model)

    from openm6.edge.package import export as write

    told = write(place, output, bits)
    size = sum(file.stat().st_size for file in output.iterdir())
    if json:
        emit({**told, "bytes": size})
    else:
        typer.echo(f"{output}: {size / 2**20:.1f} MiB. Ask it: python {output / 'openm6-edge'} tasks")


@models.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step-..., written by any number of processes.")],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    json: Json = False,
) -> None:
    """Make a training checkpoint a model directory (safetensors), a file at a time in memory."""
    if not (checkpoint / "state.json").is_file():
        raise UsageError(f"{checkpoint} is no checkpoint: give a step-... folder of a run's checkpoints.")
    require_new(output)

    from openm6.model import ModelConfig
    from openm6.train.checkpoint import consolidate as write

    write(checkpoint, output)
    _tell(output, ModelConfig.load(output), json)


def _tell(output: Path, config: ModelConfig, json: bool) -> None:
    from openm6.model.count import count_parameters

    total = sum(count_parameters(config).values())
    if json:
        emit({"model": str(output), "parameters": total, "vocab_size": config.vocab_size})
    else:
        typer.echo(f"{output}: {total / 1e6:,.1f} million parameters, {config.vocab_size:,} ids.")


Named = Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@live.")]


@models.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    directory: Annotated[Path, typer.Argument(help="The model directory; it is copied.")],
    made_of: Annotated[
        list[str] | None, typer.Option(help="NAME@3 or data:NAME@3 of what it was made of; several times.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of its training; by default the one above, if it has a recipe.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="name=value, measured; several times.")] = None,
    note: Annotated[str, typer.Option(help="Anything to remember.")] = "",
    json: Json = False,
) -> None:
    """Put a model into the catalogue, with what it was made of."""
    from openm6.hub.catalogue import Catalogue

    try:
        metrics = {key: float(value) for key, value in pairs(metric or []).items()}
    except ValueError:
        raise UsageError("--metric is name=value, the value a number.") from None
    above = directory.resolve().parent
    run = run or (above if (above / "recipe.yaml").is_file() else None)
    version = Catalogue().add_model(name, directory, made_of=made_of or [], metrics=metrics, run=run, note=note)
    emit({"name": version.name, "version": version.number}) if json else typer.echo(version.full_name)


@models.command("list")
def list_models(json: Json = False) -> None:
    """The models of the catalogue, all versions."""
    from openm6.hub.catalogue import MODEL, Catalogue

    every = Catalogue().every(MODEL)
    if json:
        emit([_version(version) for version in every])
        return
    table(["name", "version", "alias", "metrics", "kWh", "note"], [
        (v.name, v.number, ", ".join(v.aliases), v.measures,
         v.about.get("energy_kwh") or "", v.about["note"]) for v in every
    ])  # fmt: skip


@models.command()
def show(name: Named, json: Json = False) -> None:
    """Show a model of the catalogue, and what it was made of."""
    from openm6.hub.catalogue import Catalogue

    version = Catalogue().named(name)
    told = _version(version)
    emit(told) if json else table(["", ""], list(told.items()), version.full_name)


@models.command()
def lineage(name: Named, json: Json = False) -> None:
    """From a model back to its data: `openm6 models lineage goods@live`"""
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    lines = catalogue.lineage(catalogue.named(name)).lines()
    emit(lines) if json else typer.echo("\n".join(lines))


@models.command()
def promote(
    name: Named, alias: Annotated[str, typer.Option(help="What it is to be from now on.")] = "live", json: Json = False
) -> None:
    """Let an alias stand for a version: `openm6 models promote goods@3`"""
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    version = catalogue.named(name)
    before = catalogue.promote(version, alias)
    if json:
        emit({"name": version.name, "version": version.number, "alias": alias, "before": before and before.number})
    else:
        typer.echo(f"{version.full_name} is {alias}{f', which {before.full_name} was' if before else ''}.")


@models.command()
def rollback(
    name: Annotated[str, typer.Argument(help="NAME.")],
    alias: Annotated[str, typer.Option(help="Of which alias.")] = "live",
    json: Json = False,
) -> None:
    """Let an alias stand for the version before again."""
    from openm6.hub.catalogue import Catalogue

    version = Catalogue().rollback(name, alias)
    if json:
        emit({"name": version.name, "version": version.number, "alias": alias})
    else:
        typer.echo(f"{version.full_name} is {alias} again.")


@models.command()
def fetch(
    name: Named, output: Annotated[Path, typer.Argument(help="The model directory to write.")], json: Json = False
) -> None:
    """A model of the catalogue as a directory."""
    from openm6.core.bases import changed_base
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    version = catalogue.named(name)
    place = catalogue.fetch(version, output)
    if (base := version.about.get("base")) and (told := changed_base(place, base["hash"])):
        typer.secho(told, err=True)
    emit({"directory": str(place)}) if json else typer.echo(str(place))


def _version(version: Version) -> dict[str, Any]:
    made_of = [f"{kind}:{name}@{number}" for kind, name, number in version.made_of]
    return {
        "name": version.name, "version": version.number, "created": version.created,
        "aliases": list(version.aliases), "made_of": made_of, "files": version.files, **version.about,
    }  # fmt: skip
