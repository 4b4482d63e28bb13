"""openm6 models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs, find
from openm6.cli.options import Column, Json
from openm6.cli.output import emit, pairs, table
from openm6.core.bases import base_of
from openm6.core.errors import UsageError
from openm6.core.files import require_new

if TYPE_CHECKING:
    from openm6.hub.catalogue import Version
    from openm6.model import ModelConfig

models = typer.Typer(help="Convert model directories; the catalogue of models.", no_args_is_help=True)
app.add_typer(models, name="models")

Output = Annotated[Path, typer.Argument(help="Model directory to write.")]


@models.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(help="Directory of a Qwen3 or Qwen3-MoE text checkpoint (config.json, safetensors, tokenizer)."),
    ],
    output: Output,
    image_embedder: Annotated[
        str, typer.Option(help="Image encoder with random weights: stem, patch, resnet or none.")
    ] = "stem",
    num_codes: Annotated[int, typer.Option(min=0, help="Number of token ids for image codes.")] = 1024,
    max_length: Annotated[int, typer.Option(min=8, help="Maximum length of an example in positions.")] = 1024,
    json: Json = False,
) -> None:
    """Import a Qwen3 checkpoint as the backbone: same weights, added tokens, image input."""
    require_new(output)
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} is not a checkpoint: it has no config.json.")

    from openm6.compress.convert import import_model

    _tell(output, import_model(path, output, image_embedder, num_codes, max_length).model.config, json)


@models.command()
def merge(
    adapter: Annotated[
        str, typer.Argument(help="An adapter, trained by a recipe with `adapt`: directory or model of the catalogue.")
    ],
    output: Output,
    json: Json = False,
) -> None:
    """Merge an adapter into its base model."""
    require_new(output)
    place = find(adapter)
    if base_of(place) is None:
        raise UsageError(f"{adapter} is not an adapter: it has no adapter_config.json.")

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
    output: Output,
    num_experts: Annotated[int, typer.Option(min=2, help="Experts per layer, copies of its feed-forward.")],
    experts_per_token: Annotated[int, typer.Option(min=2, help="Experts per token.")] = 2,
    router: Annotated[
        str, typer.Option(help="topk, prototype (expert prototyping: k top-1) or grouped (MoGE).")
    ] = "topk",
    expert_interval: Annotated[int, typer.Option(min=1, help="Use experts in every n-th layer.")] = 1,
    json: Json = False,
) -> None:
    """Convert a dense model into a mixture of experts (sparse upcycling) with the same outputs, to train further."""
    require_new(output)
    place = find(model)

    from openm6.compress.convert import upcycle_model

    made = upcycle_model(place, output, num_experts, experts_per_token, router, expert_interval)
    _tell(output, made.model.config, json)


@models.command()
def prune(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Output,
    task: Annotated[str, typer.Option(help="Task to keep the quality of.")],
    data: Annotated[str, typer.Option(help="Records of the task with answers.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers to keep.")] = None,
    key_value_heads: Annotated[
        int | None, typer.Option(min=1, help="Number of key-value heads to keep, with their query heads.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Feed-forward units to keep per dense layer.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts to keep per layer.")] = None,
    records: Annotated[int, typer.Option(min=1, help="Number of records to measure importance on.")] = 256,
    column: Column = None,
    json: Json = False,
) -> None:
    """Prune a model: remove the parts that the data depend on least. Train it afterwards with the original as the
    teacher (`openm6 finetune --teacher`)."""
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
    output: Output,
    bits: Annotated[int, typer.Option(help="Bits per weight: 8 or 4.")] = 8,
    json: Json = False,
) -> None:
    """Quantize a model's weights (weight-only): a smaller file and, with 8 bits, faster answers on a CPU."""
    require_new(output)
    place = find(model)

    from openm6.compress.convert import quantize_model

    _tell(output, quantize_model(place, output, bits).model.config, json)


@models.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    bits: Annotated[int | None, typer.Option(help="Bits per weight: 8 or 4. Default: 32.")] = None,
    json: Json = False,
) -> None:
    """Export a model as an ONNX bundle, with a program that runs it without PyTorch."""
    require_new(output)
    place = find(model)

    from openm6.edge.package import export as write

    details = write(place, output, bits)
    size = sum(file.stat().st_size for file in output.iterdir())
    if json:
        emit({**details, "bytes": size})
    else:
        typer.echo(f"{output}: {size / 2**20:.1f} MiB. Try it: python {output / 'openm6-edge'} tasks")


@models.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step-..., written by any number of processes.")],
    output: Output,
    json: Json = False,
) -> None:
    """Convert a training checkpoint into a model directory (safetensors), with one file in memory at a time."""
    if not (checkpoint / "state.json").is_file():
        raise UsageError(f"{checkpoint} is not a checkpoint: give a step-... folder of a run's checkpoints.")
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
        typer.echo(f"{output}: {total / 1e6:,.1f} million parameters, vocabulary of {config.vocab_size:,}.")


Named = Annotated[str, typer.Argument(help="Version of a model: NAME (the latest), NAME@3 or NAME@live.")]


@models.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the model: letters, digits, - and _.")],
    directory: Annotated[Path, typer.Argument(help="Model directory, which is copied.")],
    made_of: Annotated[
        list[str] | None, typer.Option(help="A version that it derives from: NAME@3 or data:NAME@3; repeatable.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of its training run. Default: the parent, if it has a recipe.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A measured metric, name=value; repeatable.")] = None,
    note: Annotated[str, typer.Option(help="Free text.")] = "",
    json: Json = False,
) -> None:
    """Add a model to the catalogue, with its lineage."""
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
    """List all versions of all models of the catalogue."""
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
    """Show a model of the catalogue and the versions that it derives from."""
    from openm6.hub.catalogue import Catalogue

    version = Catalogue().named(name)
    details = _version(version)
    emit(details) if json else table(["", ""], list(details.items()), version.full_name)


@models.command()
def lineage(name: Named, json: Json = False) -> None:
    """Show the lineage of a model down to its data: `openm6 models lineage goods@live`"""
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    lines = catalogue.lineage(catalogue.named(name)).lines()
    emit(lines) if json else typer.echo("\n".join(lines))


@models.command()
def promote(
    name: Named, alias: Annotated[str, typer.Option(help="Alias to assign.")] = "live", json: Json = False
) -> None:
    """Assign an alias to a version: `openm6 models promote goods@3`"""
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    version = catalogue.named(name)
    before = catalogue.promote(version, alias)
    if json:
        emit({"name": version.name, "version": version.number, "alias": alias, "before": before and before.number})
    else:
        typer.echo(f"{version.full_name} is {alias}{f' (before: {before.full_name})' if before else ''}.")


@models.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    alias: Annotated[str, typer.Option(help="Alias to roll back.")] = "live",
    json: Json = False,
) -> None:
    """Assign an alias to its previous version again."""
    from openm6.hub.catalogue import Catalogue

    version = Catalogue().rollback(name, alias)
    if json:
        emit({"name": version.name, "version": version.number, "alias": alias})
    else:
        typer.echo(f"{version.full_name} is {alias} again.")


@models.command()
def fetch(name: Named, output: Output, json: Json = False) -> None:
    """Copy a model of the catalogue into a directory."""
    from openm6.core.bases import changed_base
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    version = catalogue.named(name)
    place = catalogue.fetch(version, output)
    if (base := version.about.get("base")) and (details := changed_base(place, base["hash"])):
        typer.secho(details, err=True)
    emit({"directory": str(place)}) if json else typer.echo(str(place))


def _version(version: Version) -> dict[str, Any]:
    made_of = [f"{kind}:{name}@{number}" for kind, name, number in version.made_of]
    return {
        "name": version.name, "version": version.number, "created": version.created,
        "aliases": list(version.aliases), "made_of": made_of, "files": version.files, **version.about,
    }  # fmt: skip
