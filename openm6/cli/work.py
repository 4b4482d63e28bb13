"""openm6 train, eval."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs, check_output, check_parts, find, find_task
from openm6.cli.output import Column, Encoding, Format, Images, Json, Names, NoCache, Truncate, emit, pairs, table
from openm6.core.errors import UsageError
from openm6.core.extras import require
from openm6.core.files import require_writable

if TYPE_CHECKING:
    from openm6.tasks.task import Task
    from openm6.train.recipe import AnyRecipe

Processes = Annotated[
    int, typer.Option("--processes", "-p", min=0, help="Processes on this machine; 0: one a GPU, else one a core.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe, or the name of one that comes with OpenM6.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, e.g. train.steps=500 train.learning_rate=3e-4.")
    ] = None,
    processes: Processes = 1,
    ray_workers: Annotated[int, typer.Option(min=0, help="Workers on a Ray cluster, in the place of processes.")] = 0,
    no_cache: NoCache = False,
) -> None:
    """Pretrain or continue. An interrupted run goes on by itself: run the same command again."""
    from openm6.train.recipe import load_recipe

    if ray_workers:
        from openm6.train.ray import train_on_ray

        train_on_ray(load_recipe(recipe, overrides or []), ray_workers, os.environ.get("RAY_ADDRESS"))
        return
    run_recipe(load_recipe(recipe, overrides or []), processes)


def run_recipe(recipe: AnyRecipe, processes: int) -> None:
    """Train here, or in several processes of their own."""
    from openm6.train.launch import default_processes, launch

    check_parts(recipe)
    require_writable(recipe.output)
    processes = processes or default_processes()
    if processes == 1 or "WORLD_SIZE" in os.environ:
        from openm6.train.trainer import train as run

        run(recipe)
        return
    from openm6.train.recipe import recipe_text
    from openm6.train.resume import check_resumption

    if recipe.train.batch_size % processes:
        raise UsageError(
            f"train.batch_size ({recipe.train.batch_size}) has to be a multiple of the {processes} processes."
        )
    check_resumption(recipe)  # refused here, before any process starts
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe_text(recipe), "utf-8")
        launch(["train", str(file)], processes, recipe.output / "logs")


@app.command()
def finetune(
    model: Annotated[Path, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Option(help="A task by name, YAML path or instruction.")],
    data: Annotated[list[str] | None, typer.Option(help="Data to learn from; can be given several times.")] = None,
    method: Annotated[
        str, typer.Option(help="full, or an adapter: lora, ia3, bottleneck, prompt, prefix, head.")
    ] = "full",
    validation: Annotated[
        str | None, typer.Option(help="Data to measure on: it stops when that gets no better, and keeps the best.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/finetune-TASK.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps at most.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 32,
    noise: Annotated[float, typer.Option(min=0, max=0.9, help="Share of given texts' characters to spoil.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.9, help="Of the targets.")] = 0.0,
    teacher: Annotated[Path | None, typer.Option(help="A larger model to learn from beside the labels.")] = None,
    unlabelled: Annotated[
        list[str] | None, typer.Option(help="Data without answers, which the teacher gives; several times.")
    ] = None,
    column: Column = None,
    data_format: Format = None,
    images: Images = None,
    encoding: Encoding = None,
    names: Names = None,
    seed: Annotated[int, typer.Option(help="Of order, corruptions and new weights.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes of the recipe, e.g. train.learning_rate=1e-4 adapt.rank=16.")
    ] = None,
    processes: Processes = 1,
    no_cache: NoCache = False,
) -> None:
    """Teach a model a task: all of its weights, or an adapter. The recipe is kept in the folder of the run; an
    interrupted run goes on when the same command is given again."""
    model = check_inputs(model, [task], [*(data or []), *(unlabelled or []), validation])
    teacher = find(teacher) if teacher else None

    from openm6.data.readers import with_options
    from openm6.train.finetune import finetune_recipe
    from openm6.train.recipe import override_recipe

    values = finetune_recipe(
        model, task, data or [], method, output=output, validation=validation, steps=steps, batch_size=batch_size,
        columns=pairs(column or []), noise=noise, label_smoothing=label_smoothing, teacher=teacher,
        unlabelled=unlabelled or [], seed=seed, data_format=with_options(data_format, encoding, names),
        images=images,
    )  # fmt: skip
    recipe = override_recipe(values, overrides or [])
    run_recipe(recipe, processes)
    typer.echo(f"{recipe.output / 'model'}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Option(help="A task by name or YAML path.")],
    data: Annotated[str, typer.Option(help="Data to measure on: a path, or a built-in such as demo:questions/test.")],
    column: Column = None,
    data_format: Format = None,
    images: Images = None,
    encoding: Encoding = None,
    names: Names = None,
    no_cache: NoCache = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on the first records only.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Decoding option, e.g. num_beams=4.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to measure by in the place of the task's; several times.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a report with examples.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the answers: a JSON line for every record, with its scores.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Examples with answers before every record.")] = 0,
    shots_from: Annotated[str, typer.Option(help="Data that the examples are taken from.")] = "",
    against: Annotated[
        str | None, typer.Option(help="Of a task that gives a vector: the other one, whose vectors it has to find.")
    ] = None,
    against_column: Annotated[
        list[str] | None, typer.Option("--against-column", help="slot=column, for the slots of --against.")
    ] = None,
    same: Annotated[
        list[str] | None, typer.Option(help="Column; records that agree in all of these are right for each other.")
    ] = None,
    among_negatives: Annotated[
        bool, typer.Option("--among-negatives", help="Find it among the record's own `negatives` alone.")
    ] = False,
    truncate: Truncate = None,
    json: Json = False,
) -> None:
    """Measure a model: the task's metrics, each with a 95% confidence interval."""
    from openm6.tasks.metrics import check_metric

    place = check_inputs(model, [task, against], [data, shots_from])
    chosen = find_task(place, task)
    options = decoding_options(option, chosen)
    columns, others = pairs(column or []), pairs(against_column or [])
    for name in metric or []:
        check_metric(name, chosen)
    if output and (chosen.embeds or chosen.draws):
        raise UsageError(f"--output is for answers in words: the task {chosen.name} gives none.")
    if output:
        check_output(output)
    if report:
        require("eval", "markdown", "matplotlib")
        require_writable(report)

    from openm6.data.readers import with_options
    from openm6.evaluate.answers import write_answers
    from openm6.evaluate.command import measure, measure_retrieval
    from openm6.evaluate.report import write_report
    from openm6.inference.session import Session

    session = Session.load(place)
    data_format = with_options(data_format, encoding, names)
    if chosen.embeds:
        dims: Any = options.get("dims")  # checked where vectors are cut
        result = measure_retrieval(
            session, task, against or task, data, columns, others, same or [],
            data_format, images, limit, dims, among_negatives, truncate,
        )  # fmt: skip
    else:
        result = measure(
            session, task, data, columns, data_format, images, limit, options, shots=shots,
            shots_from=shots_from, metrics=metric or (), truncate=truncate,
        )  # fmt: skip
    if output:
        write_answers(output, result)
    if report:
        write_report(report, f"{Path(model).name}: {result.task}", [result])
    if json:
        emit(result.to_dict())
        return
    rows = [(n, f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}", s.n) for n, s in result.scores.items()]
    table(["metric", "value", "95% interval", "records"], rows, f"{result.task} on {result.source}")
    for title, header, cells in result.labels.tables(matrix=6, rows=20) if result.labels else ():
        table(header, cells, title)
    for note in result.notes:
        typer.echo(note)
    if result.rejected:
        typer.echo(f"Records that could not be used: {result.rejected}, the first: {result.rejects[0][1].reason}")


def decoding_options(values: list[str] | None, task: Task | None = None) -> dict[str, float | int]:
    """`num_beams=4` as numbers. Raises UsageError for what is no number, and for an option that would do nothing since
    the task writes nothing."""
    options: dict[str, float | int] = {}
    for name, value in pairs(values or []).items():
        try:
            options[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise UsageError(f"The decoding option {name} has to be a number, not {value!r}.") from None
    if task and task.silent and (others := sorted(options.keys() - ({"dims"} if task.embeds else set()))):
        what = (
            "gives a vector: its one option is dims" if task.embeds else "is answered by a head, which has no options"
        )
        raise UsageError(f"The task {task.name} {what}; leave out {', '.join(others)}.")
    return options
