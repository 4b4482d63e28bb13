"""openm6 models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs, find, refuse_idle
from openm6.cli.options import Column, Json
from openm6.cli.output import counted, emit, pairs, table, tell
from openm6.core.bases import base_of, changed_base
from openm6.core.errors import UsageError, suggest_path
from openm6.core.files import require_new, write_whole
from openm6.hub.catalogue import MODEL as MODEL_KIND, Catalogue, Version

if TYPE_CHECKING:
    from openm6.model import ModelConfig

models = typer.Typer(help="Convert model directories; the catalogue of models.", no_args_is_help=True)
app.add_typer(models, name="models")

Output = Annotated[Path, typer.Argument(help="Model directory to write.")]


@models.command("import")
def import_(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            help="A text checkpoint of Qwen3, Qwen3-MoE, Qwen2, Llama 3, SmolLM2 or Mistral: a directory "
            "(config.json, safetensors, tokenizer.json) or a GGUF file; or a LoRA adapter of PEFT's for one."
        ),
    ],
    output: Output,
    base: Annotated[
        str, typer.Option(help="For an adapter: the model imported from the checkpoint that it was trained on.")
    ] = "",
    image_embedder: Annotated[
        str, typer.Option(help="Image encoder with random weights: stem, patch, resnet or none.")
    ] = "none",
    num_codes: Annotated[int, typer.Option(min=0, help="Number of token ids for image codes.")] = 1024,
    max_length: Annotated[int, typer.Option(min=8, help="Maximum length of an example in positions.")] = 1024,
    json: Json = False,
) -> None:
    """Import an open checkpoint as the backbone: the same weights, added tokens, image input on request. Or import an
    adapter for one."""
    require_new(output)
    if not path.exists():
        raise UsageError(f"{path} is not a checkpoint: there is no such path.{suggest_path(path)}")
    if (path / "adapter_config.json").is_file():
        refuse_idle(context, ("path", "output", "base", "json"), "an adapter changes its base model alone.")
        if not base:
            raise UsageError(f"{path} is an adapter: give the model directory of its base, --base MODEL.")
        place = find(base)

        from openm6.weights.lora import import_adapter

        import_adapter(path, place, output)
        tell(json, {"adapter": str(output), "base": str(place)}, f"{output}: an adapter of {place}.")
        return
    if base:
        raise UsageError(f"--base does nothing here: {path} is no adapter (it has no adapter_config.json).")

    from openm6.compress.convert import import_model

    with counted("MB") as progress:
        config = import_model(path, output, image_embedder, num_codes, max_length, progress)
    _tell(output, config, json)


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
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    form: Annotated[
        Literal["onnx", "huggingface", "gguf"],
        typer.Option(
            "--format",
            help="onnx: a bundle with a program that runs it without PyTorch; huggingface: for transformers, vLLM, "
            "SGLang, PEFT; gguf: for llama.cpp.",
        ),
    ] = "onnx",
    bits: Annotated[int | None, typer.Option(help="onnx: bits per weight, 8 or 4. Default: 32.")] = None,
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(help="huggingface, gguf: precision of the weights (q8_0: gguf). Default: as they are."),
    ] = None,
    json: Json = False,
) -> None:
    """Export a model for programs of others: an ONNX bundle, a Hugging Face checkpoint, or a GGUF file."""
    require_new(output)
    heeded = {"onnx": "bits", "huggingface": "dtype", "gguf": "dtype"}[form]
    refuse_idle(context, ("model", "output", "form", "json", heeded), f"--format {form} takes --{heeded} alone.")
    if form == "huggingface" and dtype == "q8_0":
        raise UsageError("--dtype q8_0 is for --format gguf; a Hugging Face checkpoint takes f32, f16 or bf16.")
    place = find(model)
    if form != "onnx":
        from openm6.compress.convert import export_model

        with counted("MB") as progress:
            export_model(place, output, form, dtype, progress)
        size = sum(file.stat().st_size for file in output.iterdir())
        tell(json, {"directory": str(output), "format": form, "bytes": size}, f"{output}: {size / 2**20:.1f} MiB.")
        return

    from openm6.edge.package import export as write

    details = write(place, output, bits)
    size = sum(file.stat().st_size for file in output.iterdir())
    text = f"{output}: {size / 2**20:.1f} MiB. Try it: python {output / 'openm6-edge'} tasks"
    tell(json, {**details, "bytes": size}, text)


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
    text = f"{output}: {total / 1e6:,.1f} million parameters, vocabulary of {config.vocab_size:,}."
    tell(json, {"model": str(output), "parameters": total, "vocab_size": config.vocab_size}, text)


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
    try:
        metrics = {key: float(value) for key, value in pairs(metric or []).items()}
    except ValueError:
        raise UsageError("--metric is name=value, the value a number.") from None
    above = directory.resolve().parent
    run = run or (above if (above / "recipe.yaml").is_file() else None)
    version = Catalogue().add_model(name, directory, made_of=made_of or [], metrics=metrics, run=run, note=note)
    tell(json, {"name": version.name, "version": version.number}, version.full_name)


@models.command("list")
def list_models(json: Json = False) -> None:
    """List all versions of all models of the catalogue."""
    every = Catalogue().every(MODEL_KIND)
    if json:
        emit([_version(version) for version in every])
        return
    table(["name", "version", "alias", "metrics", "kWh", "note"], [
        (v.name, v.number, ", ".join(v.aliases), v.measures,
         v.about.get("energy_kwh") or "", v.about["note"]) for v in every
    ])  # fmt: skip


@models.command()
def show(
    name: Annotated[str, typer.Argument(help="Version of a model (NAME, NAME@3, NAME@live), or a model directory.")],
    json: Json = False,
) -> None:
    """Show a model directory, or a model of the catalogue with the versions that it derives from, and its licence."""
    if Path(name).is_dir():
        details, title = _directory(Path(name)), name
    else:
        version = Catalogue().named(name)
        details, title = _version(version), version.full_name
    if json:
        emit(details)
        return

    from openm6.weights.origin import licences

    if origin := details.pop("origin", None):
        for name, terms in licences(origin).items():
            details[f"licence of {name}"] = terms
    table(["", ""], details.items(), title)


@models.command()
def lineage(name: Named, json: Json = False) -> None:
    """Show the lineage of a model down to its data: `openm6 models lineage goods@live`"""
    lines = Catalogue().lineage(Catalogue().named(name)).lines()
    tell(json, lines, "\n".join(lines))


@models.command()
def promote(
    name: Named, alias: Annotated[str, typer.Option(help="Alias to assign.")] = "live", json: Json = False
) -> None:
    """Assign an alias to a version: `openm6 models promote goods@3`"""
    catalogue = Catalogue()
    version = catalogue.named(name)
    before = catalogue.promote(version, alias)
    value = {"name": version.name, "version": version.number, "alias": alias, "before": before and before.number}
    tell(json, value, f"{version.full_name} is {alias}{f' (before: {before.full_name})' if before else ''}.")


@models.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    alias: Annotated[str, typer.Option(help="Alias to roll back.")] = "live",
    json: Json = False,
) -> None:
    """Assign an alias to its previous version again."""
    version = Catalogue().rollback(name, alias)
    value = {"name": version.name, "version": version.number, "alias": alias}
    tell(json, value, f"{version.full_name} is {alias} again.")


@models.command()
def fetch(name: Named, output: Output, json: Json = False) -> None:
    """Copy a model of the catalogue into a directory."""
    catalogue = Catalogue()
    version = catalogue.named(name)
    place = catalogue.fetch(version, output)
    if (base := version.about.get("base")) and (details := changed_base(place, base["hash"])):
        typer.secho(details, err=True)
    tell(json, {"directory": str(place)}, str(place))


def _directory(path: Path) -> dict[str, Any]:
    from openm6.model import ModelConfig
    from openm6.model.count import count_parameters
    from openm6.tasks.card import read_card, read_origin

    tasks, length, _ = read_card(path)
    base = base_of(path)
    config, origin = ModelConfig.load(base or path), read_origin(path)
    return {
        "model": str(path), **({"adapter of": str(base)} if base else {}),
        "parameters": sum(count_parameters(config).values()), "vocab_size": config.vocab_size,
        "max_length": length, "tasks": [task.name for task in tasks], **({"origin": origin} if origin else {}),
    }  # fmt: skip


def _version(version: Version) -> dict[str, Any]:
    made_of = [f"{kind}:{name}@{number}" for kind, name, number in version.made_of]
    return {
        "name": version.name, "version": version.number, "created": version.created,
        "aliases": list(version.aliases), "made_of": made_of, "files": version.files, **version.about,
    }  # fmt: skip
