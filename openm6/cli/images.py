"""openm6 images: draw, measure."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from openm6.cli import app
from openm6.cli.output import Json, emit, pairs, table
from openm6.cli.work import decoding_options

images = typer.Typer(help="Pictures out: draw candidates, measure what a model draws.", no_args_is_help=True)
app.add_typer(images, name="images")

Options = Annotated[list[str] | None, typer.Option("--option", "-o", help="Option of drawing, e.g. passes=12.")]
TaskName = Annotated[str, typer.Option(help="A task that draws, by name or YAML path.")]


def slots_of(values: list[str] | None) -> dict[str, Any]:
    return dict(pairs(values or []))


@images.command()
def draw(
    model: Annotated[str, typer.Argument(help="A model directory.")],
    slots: Annotated[list[str] | None, typer.Argument(help="slot=value; a picture is a path.")] = None,
    task: TaskName = "text_to_image",
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Pictures to choose from.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    option: Options = None,
    json: Json = False,
) -> None:
    """Candidates for one wish, the best by the model's own estimates first: 1.png, 2.png, ..."""
    from openm6.bundle import Bundle

    bundle = Bundle.load(model)
    drawn = bundle.draw(task, candidates=candidates, decoding=decoding_options(option), **slots_of(slots))
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, painting in enumerate(drawn, start=1):
        file = output / f"{number}.png"
        painting.image.save(file)
        rows.append({"file": str(file), "score": round(painting.score, 4), **painting.estimates})
    if json:
        emit(rows)
        return
    table(list(rows[0]), [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows])


@images.command()
def measure(
    model: Annotated[str, typer.Argument(help="A model directory.")],
    judge: Annotated[str, typer.Option(help="Model directory of a judge (recipes/judge.yaml).")],
    data: Annotated[str, typer.Option(help="Real pictures, their captions and attributes.")] = "demo:items/test",
    task: TaskName = "text_to_image",
    judge_task: Annotated[str, typer.Option(help="What the judge reads in a picture.")] = "product_attributes",
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Of which the best one counts.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on the first records only.")] = None,
    grid: Annotated[Path | None, typer.Option(help="PNG file for a sheet of drawn pictures.")] = None,
    option: Options = None,
    json: Json = False,
) -> None:
    """What a judge reads in drawn pictures, in real ones and in those that only went through the codec."""
    from openm6.bundle import Bundle
    from openm6.evaluate.pictures import Judge, draw_sheet, measure_drawing, read_wishes

    bundle = Bundle.load(model)
    judging = Judge(Bundle.load(judge), judge_task)
    records, wanted = read_wishes(bundle, task, judging, data)
    chosen = list(islice(zip(records, wanted, strict=True), limit))
    rows, drawn = measure_drawing(
        bundle, task, judging, [r for r, _ in chosen], [w for _, w in chosen], candidates, decoding_options(option)
    )
    if grid:
        draw_sheet(drawn, grid)
    if json:
        emit(rows)
        return
    table(
        ["measure", *rows],
        [[name, *(f"{r[name]:.3f}" if name in r else "" for r in rows.values())] for name in rows["drawn"]],
        f"{len(chosen)} pictures of {data}",
    )
