"""openm6 demo, demo-images."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from openm6.cli.app import app
from openm6.cli.options import Json
from openm6.cli.output import emit, show_measures, table
from openm6.cli.work import Processes, run_recipe
from openm6.core.extras import require
from openm6.core.files import require_writable

T = TypeVar("T")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model and its report.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the demo recipe, e.g. train.steps=500.")
    ] = None,
    processes: Processes = 1,
    json: Json = False,
) -> None:
    """Train a small M6 on the built-in catalogue, evaluate it on unseen combinations, write a report."""
    require("demo", "sklearn", "matplotlib", "markdown")
    require_writable(output)

    from openm6.evaluate.demo import report_demo
    from openm6.train.recipe import load_recipe

    changes = [f"output={output}", *(overrides or [])]
    recipe = load_recipe("demo", changes)
    run_recipe(recipe, processes)
    figures = report_demo(recipe.output / "model", recipe.output)
    if json:
        emit(figures)
        return
    table(["question", "accuracy", "95% interval", "records"], [
        (f["name"], f"{f['value']:.1%}", f"{f['low']:.1%} to {f['high']:.1%}", f["n"]) for f in figures["figures"]
    ], "On combinations and digits that the model has never seen")  # fmt: skip
    typer.echo(f"Report: {figures['report']}")


@app.command("demo-images")
def demo_images(
    output: Annotated[Path, typer.Option(help="Folder for the models and their report.")] = Path("runs/demo-images"),
    start: Annotated[Path, typer.Option(help="Output of `openm6 demo`, trained first if missing.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Random seed of all trainings.")] = 0,
    json: Json = False,
) -> None:
    """Train the demo's model to draw: image codec, text to image, estimators; evaluated by a judge model."""
    require("demo", "sklearn", "matplotlib", "markdown")
    require_writable(output)

    from openm6.evaluate.demo_images import draw_own, report_images
    from openm6.train.recipe import load_recipe

    spent: list[str] = []

    def timed(what: str, act: Callable[[], T]) -> T:
        started = time.monotonic()
        made = act()
        spent.append(f"{what} {(time.monotonic() - started) / 60:.1f}")
        return made

    def trained(name: str, folder: Path, *changes: str, seed: int = seed) -> Path:
        every = [f"output={folder}", f"seed={seed}", *changes]
        model = folder / "model"
        if not model.is_dir():
            timed(name, lambda: run_recipe(load_recipe(name, every), 1))
        return model

    base = trained("demo", start)
    judge = trained("judge", output / "judge", seed=seed + 1000)
    codec = trained("codec_64", output / "codec", f"codec.eyes={base}")
    painter = trained("demo_images", output / "drawing", f"model.path={base}", f"model.codec={codec}")
    own = timed("own pictures", lambda: draw_own(painter, "demo:studio/train", output / "own"))
    model = trained("demo_images_estimates", output, f"model.path={painter}", f"data.0.source={own}")
    figures = timed("report", lambda: report_images(model, judge, output))
    if json:
        emit(figures)
        return
    show_measures(figures["rows"], "On combinations that the models have never seen")
    edits = figures["edits"]
    typer.echo(
        f"Edits: pixels outside the mask unchanged {edits['kept']:.1%}, attribute changed {edits['changed']:.1%}"
    )
    typer.echo(f"Minutes: {', '.join(spent)}")
    typer.echo(f"Report: {figures['report']}")
