"""openm6 compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.cli.checks import check_inputs, find, refuse_idle
from openm6.cli.options import Column, Json
from openm6.cli.output import emit, pairs, share, table
from openm6.core.errors import UsageError
from openm6.core.files import require_writable


@app.command()
def compress(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            help="Model directory, model of the catalogue (goods@live), or YAML file with a chain of steps."
        ),
    ],
    task: Annotated[str, typer.Option(help="Task to keep the quality of.")] = "",
    data: Annotated[str, typer.Option(help="Training records of the task.")] = "",
    validation: Annotated[str, typer.Option(help="Held-out records to measure on.")] = "",
    unlabelled: Annotated[str | None, typer.Option(help="Records without answers, labelled by the model.")] = None,
    target: Annotated[str, typer.Option(help="size=2MB, or latency=5ms for one answer.")] = "",
    max_loss: Annotated[
        str, typer.Option(help="Largest loss of the task's first metric, relative to the model's own: 1% or 0.01.")
    ] = "1%",
    form: Annotated[
        str, typer.Option(help="package: an ONNX bundle, without PyTorch; model: a model directory.")
    ] = "package",
    steps: Annotated[int, typer.Option(min=1, help="Training steps after each pruning.")] = 300,
    limit: Annotated[int, typer.Option(min=1, help="Number of records to measure on.")] = 500,
    output: Annotated[Path | None, typer.Option(help="Output folder. Default: runs/compress.")] = None,
    column: Column = None,
    seed: Annotated[int, typer.Option(help="Random seed of data order and new weights.")] = 0,
    json: Json = False,
) -> None:
    """Compress a model to a size or latency: prune, distil, quantize, export, measuring each step. An interrupted run
    is resumed by the same command."""
    import yaml

    from openm6.compress.compressed import Target, table_of

    say = lambda text: typer.echo(text, err=True)  # noqa: E731
    if model.suffix in (".yaml", ".yml"):
        refuse_idle(context, ("model", "json"), f"a chain is done as it is written; change {model} itself.")
        try:
            values = yaml.safe_load(model.read_text("utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{model} cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{model} is not a chain: it needs the keys model, output, tasks and steps.")
        if "model" in values:
            values["model"] = str(find(str(values["model"])))

        from openm6.compress.compress import check_chain, compress as run

        chain = check_chain(values, str(model))
        require_writable(chain.output)
        rows, found, wanted, near = run(chain, say), None, None, ""
    else:
        if not (task and data and validation and target):
            raise UsageError("Give --task, --data, --validation and --target, or a YAML file with a chain of steps.")
        wanted, most, columns = Target.of(target), share(max_loss, "--max-loss"), pairs(column or [])
        place = check_inputs(model, [task], [data, validation, unlabelled])
        require_writable(output or Path("runs/compress"))

        from openm6.compress.compress import DistillStep, check_chain, search

        chain = check_chain({
            "model": str(place), "output": str(output or Path("runs/compress")), "seed": seed,
            "tasks": [{
                "task": task, "data": data, "validation": validation, "unlabelled": unlabelled,
                "columns": columns, "limit": limit,
            }],
        })  # fmt: skip
        rows, found, near = search(chain, wanted, most, form, DistillStep(steps=steps), say)
    if json:
        emit({"rows": rows, "found": found, "nearest": near or None})
    else:
        table(*table_of(rows))
    if wanted is not None:
        if found is None:
            typer.echo(f"No chain meets {target} with a loss of at most {max_loss}. {near}", err=True)
            raise typer.Exit(1)
        typer.echo(f"{found['step']} meets {target}: {chain.output / 'best'}", err=True)
