"""openm6 models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openm6.cli import app
from openm6.cli.output import Json, emit

if TYPE_CHECKING:
    from openm6.model import ModelConfig

models = typer.Typer(help="Model directories.", no_args_is_help=True)
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
    from openm6.convert import import_bundle

    _tell(output, import_bundle(path, output, image_embedder, num_codes, max_length).model.config, json)


@models.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter: what a recipe with `adapt` trains.")],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    json: Json = False,
) -> None:
    """Make an adapter and the model beneath it one model directory."""
    from openm6.atomic import require_new, write_whole
    from openm6.bundle import Bundle
    from openm6.errors import UsageError
    from openm6.model.adapters import MERGEABLE, base_of, method_of

    require_new(output)
    if base_of(adapter) is None:
        raise UsageError(f"{adapter} is no adapter: it has no adapter_config.json.")
    if (method := method_of(adapter)) not in MERGEABLE:
        raise UsageError(
            f"{adapter} is an adapter of the method {method}, which stays beside its model: use it as it is. "
            f"Merged are: {', '.join(MERGEABLE)}."
        )
    bundle = Bundle.load(adapter, "cpu", trainable=True)
    write_whole(output, bundle.save)
    _tell(output, bundle.model.config, json)


@models.command()
def upcycle(
    model: Annotated[Path, typer.Argument(help="A dense model directory.")],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    num_experts: Annotated[int, typer.Option(min=2, help="Experts a layer, each a copy of its feed-forward.")],
    experts_per_token: Annotated[int, typer.Option(min=2, help="Experts that see a token.")] = 2,
    router: Annotated[str, typer.Option(help="topk, prototype or grouped.")] = "topk",
    expert_interval: Annotated[int, typer.Option(min=1, help="Experts in every n-th layer.")] = 1,
    json: Json = False,
) -> None:
    """Make a dense model one of experts that answers the same; training on lets them part."""
    from openm6.convert import upcycle_bundle

    made = upcycle_bundle(model, output, num_experts, experts_per_token, router, expert_interval)
    _tell(output, made.model.config, json)


@models.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step-..., written by any number of processes.")],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    json: Json = False,
) -> None:
    """Make a training checkpoint a model directory (safetensors), a file at a time in memory."""
    from openm6.atomic import require_new
    from openm6.errors import UsageError
    from openm6.model import ModelConfig
    from openm6.train.checkpoint import consolidate as write

    if not (checkpoint / "state.json").is_file():
        raise UsageError(f"{checkpoint} is no checkpoint: give a step-... folder of a run's checkpoints.")
    require_new(output)
    write(checkpoint, output)
    _tell(output, ModelConfig.from_pretrained(output), json)


def _tell(output: Path, config: ModelConfig, json: bool) -> None:
    total = sum(config.count_parameters().values())
    if json:
        emit({"model": str(output), "parameters": total, "vocab_size": config.vocab_size})
    else:
        typer.echo(f"{output}: {total / 1e6:,.1f} million parameters, {config.vocab_size:,} ids.")
