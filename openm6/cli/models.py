"""openm6 models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli import app
from openm6.cli.output import Json, emit

models = typer.Typer(help="Model directories.", no_args_is_help=True)
app.add_typer(models, name="models")


@models.callback()
def _models() -> None:
    """Keeps `import` a sub-command while it is the only one."""


@models.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(help="Directory of a Qwen3 text checkpoint (config.json, safetensors, tokenizer).")
    ],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    image_embedder: Annotated[str, typer.Option(help="stem, patch, resnet or none; starts at random.")] = "stem",
    num_codes: Annotated[int, typer.Option(min=0, help="Ids reserved for image codes.")] = 1024,
    max_length: Annotated[int, typer.Option(min=8, help="Longest example in positions.")] = 1024,
    json: Json = False,
) -> None:
    """Make the backbone of a Qwen3 checkpoint: same weights, new tokens behind the old ones, pictures in."""
    from openm6.bundle import import_bundle

    bundle = import_bundle(path, output, image_embedder, num_codes, max_length)
    parts = bundle.model.config.count_parameters()
    total, ids = sum(parts.values()), bundle.model.config.vocab_size
    if json:
        emit({"model": str(output), "parameters": total, "vocab_size": ids})
    else:
        typer.echo(f"{output}: {total / 1e6:,.1f} million parameters, {ids:,} ids.")
