"""openm6 demo, demo-images, bench, reproduce. The last two are for a source checkout."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

import openm6
from openm6.cli.app import app
from openm6.cli.options import Json
from openm6.cli.output import emit, show_measures, table
from openm6.cli.work import Processes, run_recipe
from openm6.core.errors import UsageError, suggest
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
    codec = trained("codec_64", output / "codec", f"codec.perceptual_model={base}")
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


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Name of a file in benchmarks/: train-step, decode, experts, serve ...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON. Default: benchmarks/results.")] = None,
) -> None:
    """Run a benchmark against other libraries in one process; print a table and write JSON."""
    _run_script("benchmarks", "benchmark", name, out)


@app.command()
def reproduce(
    claim: Annotated[
        str,
        typer.Argument(
            help="prototyping, auxiliary-loss, capacity, pseudo-to-real, sparse-vs-dense, progressive or five-percent."
        ),
    ],
    scale: Annotated[str, typer.Option(help="small: minutes on two cores; large: needs a GPU.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Folder for the page. Default: docs/reproduce.")] = None,
) -> None:
    """Reproduce a claim of the papers with several seeds; write a page with curves and the verdict."""
    _run_script("reproduce", "claim", claim, out, "--scale", scale)


def _run_script(folder: str, kind: str, name: str, out: Path | None, *words: str) -> None:
    """Run a script of a folder of the source checkout, and exit with its code. Raises UsageError for an unknown one."""
    root = Path(openm6.__file__).resolve().parents[1]
    scripts = (path.stem for path in (root / folder).glob("[!_]*.py"))
    names = sorted(stem.replace("_", "-") for stem in scripts if stem not in ("common", "corpus"))
    if not names:
        raise UsageError(f"A {kind} comes with the source checkout; this installation has none.")
    if name.replace("_", "-") not in names:
        raise UsageError(f"There is no {kind} {name}.{suggest(name, names)} There are: {', '.join(names)}.")
    if out:
        require_writable(out)
        words = (*words, "--out", str(out.resolve()))
    raise typer.Exit(subprocess.run([sys.executable, "-m", folder, name, *words], cwd=root, check=False).returncode)
