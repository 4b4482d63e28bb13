"""openm6 run, predict, train, finetune, eval."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.checks import MODEL, PICTURES, check_inputs, check_output, check_parts, check_slots, find, find_task
from openm6.cli.output import counted, emit, pairs, table
from openm6.core.errors import UsageError
from openm6.core.extras import require
from openm6.core.files import require_writable
from openm6.data.writers import writer_for

if TYPE_CHECKING:
    from openm6.tasks.task import Task
    from openm6.train.recipe import AnyRecipe

Processes = Annotated[
    int, typer.Option("--processes", "-p", min=0, help="Processes on this machine; 0: one per GPU, else one per core.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe, or name of a built-in recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, e.g. train.steps=500 train.learning_rate=3e-4.")
    ] = None,
    processes: Processes = 1,
    ray_workers: Annotated[
        int, typer.Option(min=0, help="Workers on the Ray cluster at $RAY_ADDRESS instead of processes; 0: none.")
    ] = 0,
    no_cache: options.NoCache = False,
) -> None:
    """Train a model by a recipe. An interrupted run is resumed by the same command."""
    from openm6.train.recipe import load_recipe

    if ray_workers:
        from openm6.train.ray import train_on_ray

        train_on_ray(load_recipe(recipe, overrides or []), ray_workers, os.environ.get("RAY_ADDRESS"))
        return
    run_recipe(load_recipe(recipe, overrides or []), processes)


def run_recipe(recipe: AnyRecipe, processes: int) -> None:
    """Train in this process or, with several `processes`, in child processes."""
    from openm6.train.launch import default_processes, launch

    require_writable(recipe.output)
    check_parts(recipe)
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
    check_resumption(recipe)  # before any process starts
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe_text(recipe), "utf-8")
        launch(["train", str(file)], processes, recipe.output / "logs")


@app.command()
@options.reads_data()
def finetune(
    model: Annotated[Path, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Option(help="Task by name, YAML path or instruction.")],
    data: Annotated[list[str] | None, typer.Option(help="Training data; repeatable.")] = None,
    method: Annotated[
        str, typer.Option(help="full, or an adapter: lora, ia3, bottleneck, prompt, prefix, head.")
    ] = "full",
    validation: Annotated[
        str | None, typer.Option(help="Validation data for early stopping; the best checkpoint is kept.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/finetune-TASK.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Maximum number of steps.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 32,
    noise: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction of input characters to corrupt.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.9, help="Label-smoothing factor.")] = 0.0,
    teacher: Annotated[Path | None, typer.Option(help=f"Teacher for distillation. {MODEL}")] = None,
    unlabelled: Annotated[
        list[str] | None, typer.Option(help="Data without answers, labelled by the teacher; repeatable.")
    ] = None,
    reading: options.Reading = options.AUTOMATIC,
    seed: Annotated[int, typer.Option(help="Random seed of data order, corruption and new weights.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the recipe, e.g. train.learning_rate=1e-4 adapt.rank=16.")
    ] = None,
    processes: Processes = 1,
) -> None:
    """Fine-tune a model on a task: all weights, or an adapter. The recipe is stored in the folder of the run; an
    interrupted run is resumed by the same command."""
    model = check_inputs(model, [task], [*(data or []), *(unlabelled or []), validation])
    teacher = find(teacher) if teacher else None

    from openm6.train.finetune import finetune_recipe
    from openm6.train.recipe import override_recipe

    values = finetune_recipe(
        model, task, data or [], method, output=output, validation=validation, steps=steps, batch_size=batch_size,
        columns=reading.columns, noise=noise, label_smoothing=label_smoothing, teacher=teacher,
        unlabelled=unlabelled or [], seed=seed, data_format=reading.format,
        images=reading.images,
    )  # fmt: skip
    recipe = override_recipe(values, overrides or [])
    run_recipe(recipe, processes)
    typer.echo(f"{recipe.output / 'model'}")


@app.command("eval")
@options.reads_data()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Option(help="Task by name or YAML path.")],
    data: Annotated[str, typer.Option(help="Evaluation data: a path, or built-in data such as demo:questions/test.")],
    reading: options.Reading = options.AUTOMATIC,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of records to use, the first ones.")] = None,
    option: options.DecodingOption = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric instead of the task's own; repeatable.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for an HTML report with examples.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the answers: one JSON line per record, with its scores.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Number of few-shot examples before every record.")] = 0,
    shots_from: Annotated[str, typer.Option(help="Data to draw the few-shot examples from.")] = "",
    against: Annotated[
        str | None, typer.Option(help="Retrieval: task that embeds the items to find. Default: --task.")
    ] = None,
    against_column: Annotated[
        list[str] | None, typer.Option("--against-column", help="Column of a slot of --against: slot=column.")
    ] = None,
    same: Annotated[
        list[str] | None, typer.Option(help="Retrieval: column whose equal values make items relevant; repeatable.")
    ] = None,
    among_negatives: Annotated[
        bool, typer.Option("--among-negatives", help="Retrieval: rank only among the record's own `negatives`.")
    ] = False,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Evaluate a model: the task's metrics (accuracy, perplexity, recall ...) with 95% confidence intervals."""
    from openm6.tasks.metrics import check_metric

    place = check_inputs(model, [task, against], [data, shots_from])
    chosen = find_task(place, task)
    decoding, against_columns = decoding_options(option, chosen), pairs(against_column or [])
    for name in metric or []:
        check_metric(name, chosen)
    if output and (chosen.embeds or chosen.draws):
        raise UsageError(f"--output is for text answers: the task {chosen.name} gives none.")
    if output:
        check_output(output)
    if report:
        require("eval", "markdown", "matplotlib")
        require_writable(report)

    from openm6.evaluate.command import measure, measure_retrieval
    from openm6.evaluate.report import write_answers, write_report
    from openm6.inference.session import Session

    session = Session.load(place)
    if chosen.embeds:
        dims: Any = decoding.get("dims")  # checked where vectors are cut
        result = measure_retrieval(
            session, task, against or task, data, reading.columns, against_columns, same or [],
            reading.format, reading.images, limit, dims, among_negatives, truncate,
        )  # fmt: skip
    else:
        with counted("records") as on_progress:
            result = measure(
                session, task, data, reading.columns, reading.format, reading.images, limit, decoding, shots=shots,
                shots_from=shots_from, metrics=metric or (), truncate=truncate, on_progress=on_progress,
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


@app.command()
@options.reads_data()
def predict(
    model: Annotated[str, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Argument(help="Task by name or YAML path.")],
    data: Annotated[str, typer.Option(help="Input records: CSV, JSON lines, Parquet, or another source.")],
    output: Annotated[Path, typer.Option(help="Output file: .csv, .jsonl or .parquet.")],
    reading: options.Reading = options.AUTOMATIC,
    option: options.DecodingOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per batch.")] = 64,
    probabilities: Annotated[bool, typer.Option(help="Label tasks: add a column with all probabilities.")] = False,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Answer every record of a table and write the answers beside its columns. An interrupted run is resumed by the
    same command."""
    place = check_inputs(model, [task], [data])
    decoding = decoding_options(option, find_task(place, task))
    writer_for(output)
    check_output(output)

    from openm6.evaluate.predict import Prediction
    from openm6.inference.session import Session

    prediction = Prediction(
        Session.load(place), task, data, output, columns=reading.columns, images=reading.images,
        data_format=reading.format, decoding=decoding, batch_size=batch_size,
        all_probabilities=probabilities, truncate=truncate,
    )  # fmt: skip
    asked = ", ".join(f"{slot} from {name}" for slot, name in prediction.view.mapping.items())
    typer.echo(f"{prediction.total} records: {asked}; new columns: {', '.join(prediction.added.values())}.", err=True)
    with counted("records") as on_progress:
        done = prediction.run(on_progress)
    if json:
        emit(done)
        return
    resumed = f", {done['resumed']} of them earlier" if done["resumed"] else ""
    typer.echo(f"{done['answered']} of {done['records']} records were answered{resumed}, in {done['seconds']:.0f} s.")
    if done["bad"]:
        typer.echo(f"{done['bad']} failed: see the column {prediction.added['error']} of {output}.")


def decoding_options(values: list[str] | None, task: Task | None = None) -> dict[str, float | int]:
    """`num_beams=4` as numbers. Raises UsageError for a value that is not a number and for an option that has no effect
    on the task."""
    decoding: dict[str, float | int] = {}
    for name, value in pairs(values or []).items():
        try:
            decoding[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise UsageError(f"The decoding option {name} has to be a number, not {value!r}.") from None
    if task and task.produces_no_tokens and (others := sorted(decoding.keys() - ({"dims"} if task.embeds else set()))):
        what = (
            "gives a vector: its only option is dims" if task.embeds else "is answered by a head, which has no options"
        )
        raise UsageError(f"The task {task.name} {what}; leave out {', '.join(others)}.")
    return decoding


@app.command()
def run(
    model: Annotated[str, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Argument(help="Task by name or YAML path.")],
    slots: Annotated[
        list[str] | None, typer.Argument(help="Inputs of the task, slot=value; a picture is a path.")
    ] = None,
    option: options.DecodingOption = None,
    output: Annotated[Path, typer.Option(help="Output file of a task that draws.")] = Path("picture.png"),
    examples: Annotated[str | None, typer.Option(help="Few-shot examples: data with inputs and answers.")] = None,
    truncate: options.Truncate = None,
    system: Annotated[str | None, typer.Option(help="Text before all (a chat template's system role).")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Reason before the answer, where the model can.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Answer one request: `openm6 run runs/demo/model vqa photo=a.jpg question=这是什么商品?`"""
    place = check_inputs(model, [task], [examples])
    asked: dict[str, Any] = dict(pairs(slots or []))
    chosen = find_task(place, task)
    check_slots(chosen, asked)
    decoding = decoding_options(option, chosen)
    if chosen.draws:
        check_output(output, PICTURES)

    from openm6.core.images import save, seed_of_drawn
    from openm6.data.columns import SlotView
    from openm6.data.source import open_source
    from openm6.inference.modes import mode_of
    from openm6.inference.request import Request
    from openm6.inference.session import Session
    from openm6.tasks.record import labels_of

    session, shown = Session.load(place), list[Any]()
    chosen = session.task(task)
    if examples:
        records = open_source(examples)
        shown = [SlotView.of(chosen, records)(record) for record in records]
    more: dict[str, Any] = {"truncate": truncate, "system": system, "thinking": thinking}
    answer, beside = session.run(task, decoding=decoding, examples=shown, **more, **asked), {}
    result = mode_of(chosen).result
    if result == "picture":
        output.parent.mkdir(parents=True, exist_ok=True)
        save(answer, output)
        beside = {"seed": seed_of_drawn(answer)}
        typer.echo(f"Seed: {beside['seed']}.", err=True)
        answer = str(output)
    elif result == "vector":
        answer = [round(float(number), 6) for number in answer]
    if json:
        fields = {"task": task, "answer": answer, "trained": session.is_trained_on(chosen), **beside}
        request = Request(asked, shown, **more)
        if truncate:
            fields["truncated"] = session.prompt(chosen, request).truncated
        if len(chosen.outputs) == 1 and labels_of(chosen, asked, chosen.outputs[0]):
            found = next(session.label_probabilities(task, [request]))
            fields["probabilities"] = dict(sorted(found.items(), key=lambda pair: -pair[1]))
        emit(fields)
    elif isinstance(answer, dict):
        for name, value in answer.items():
            typer.echo(f"{name}: {value}")
    else:
        typer.echo(answer)
