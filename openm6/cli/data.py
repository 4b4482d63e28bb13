"""openm6 data, tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.checks import MODEL, find, find_task
from openm6.cli.output import counted, emit, table, tell
from openm6.hub.catalogue import DATA, Catalogue

data = typer.Typer(help="Check data before training; the catalogue of data sets.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
@options.reads_data()
def check(
    source: Annotated[str, typer.Argument(help="Path, URL or glob, or built-in data such as demo:questions/test.")],
    task: Annotated[str, typer.Option(help="Task to check the data for, by name or YAML path.")],
    reading: options.Reading = options.AUTOMATIC,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of records to check, the first ones.")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL} Counts tokens and records that are too long for it.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Evaluation data to count overlapping records with.")] = None,
    json: options.Json = False,
) -> None:
    """Open every record as training would, show three encoded examples, and report what is wrong. Exit code 1 if any
    record is rejected."""
    from openm6.data.check import Check
    from openm6.data.columns import check_command

    values = {
        "format": reading.data_format, "images": reading.images, "encoding": reading.encoding, "names": reading.names,
    }  # fmt: skip
    words = [word for name, value in values.items() if value for word in (f"--{name}", value)]
    command = check_command(source, task, *words)
    place, processor = find(model) if model else None, None
    chosen = find_task(place, task)
    if place:
        from openm6.weights.directory import open_processor

        processor, _ = open_processor(place)
    checked = Check(
        source, chosen, reading.columns, reading.format, reading.images, limit, command, processor, against
    )  # fmt: skip
    with counted("records") as on_progress:
        for number, record in enumerate(checked.records(), 1):
            checked.look(record)
            on_progress(number, checked.total)
    result = checked.to_dict()
    if json:
        emit(result)
    else:
        typer.echo(f"{source}: {result['good']} of {result['records']} records can be used for {result['task']}.")
        for slot, name in result["columns"].items():
            typer.echo(f"  {slot} <- {name or '(no column; optional)'}")
        for example in result["examples"]:
            typer.echo(f"  {example['where']}: {example['source']} -> {example['target']}")
        for what in ("characters", "tokens"):
            rows = [(name, v["median"], v["longest"]) for name, v in result.get(what, {}).items()]
            if rows:
                table(["slot", "median", "longest"], rows, what)
        for text in checked.sentences():
            typer.echo(f"  {text}")
        for problem in result["problems"]:
            typer.echo(f"  {problem['count']} x {problem['reason']} (first: {problem['where']})")
    if result["records"] > result["good"]:
        raise typer.Exit(1)


@data.command()
@options.reads_data("column")
def add(
    name: Annotated[str, typer.Argument(help="Name of the data set: letters, digits, - and _.")],
    source: Annotated[str, typer.Argument(help="Path, URL or glob, or built-in data such as demo:questions/test.")],
    reading: options.Reading = options.AUTOMATIC,
    json: options.Json = False,
) -> None:
    """Register a data set in the catalogue with its schema and hash; the files stay in place. An unchanged data set
    gets no new version."""
    version = Catalogue().add_data(name, source, reading.format, reading.images)
    text = f"{version.full_name}: {version.about['records']} records, {version.about['hash'][:12]}"
    tell(json, {"name": version.name, "version": version.number, **version.about}, text)


@data.command("list")
def list_data(json: options.Json = False) -> None:
    """List the data sets of the catalogue, the latest version of each."""
    catalogue = Catalogue()
    last = [catalogue.named(name, DATA) for name in catalogue.names(DATA)]
    if json:
        emit([{"name": v.name, "version": v.number, **v.about} for v in last])
        return
    rows = [(v.name, v.number, v.about["records"], v.about["source"]) for v in last]
    table(["name", "version", "records", "source"], rows)


@data.command()
def show(name: Annotated[str, typer.Argument(help="NAME, or NAME@3.")], json: options.Json = False) -> None:
    """Show a data set of the catalogue: columns, records, hash, source."""
    version = Catalogue().named(name, DATA)
    if json:
        emit({"name": version.name, "version": version.number, "created": version.created, **version.about})
        return
    rows = [(key, value) for key, value in version.about.items() if key != "columns"]
    rows += [(f"column {column}", kind) for column, kind in version.about["columns"].items()]
    table(["", ""], rows, version.full_name)


tasks = typer.Typer(help="List the tasks of the library; show one with its schemas.", invoke_without_command=True)
app.add_typer(tasks, name="tasks")


@tasks.callback()
def list_tasks(context: typer.Context, json: options.Json = False) -> None:
    """List the tasks of the library."""
    if context.invoked_subcommand:
        return
    from openm6.tasks.library import get, names

    found = [get(name) for name in names()]
    rows = [(t.name, t.instructions[0].text, t.description) for t in found]
    emit([task.to_dict() for task in found]) if json else table(["task", "first instruction", ""], rows)


@tasks.command("show")
def show_task(
    name: Annotated[str, typer.Argument(help="Task by name or YAML path.")], json: options.Json = False
) -> None:
    """Show a task: instructions, metrics, example, and the JSON schemas of inputs and outputs."""
    from openm6.tasks.library import get

    task = get(name)
    if json:
        emit({**task.to_dict(), "schema": task.schema()})
        return
    import yaml

    content = {key: value for key, value in task.to_dict().items() if value}
    typer.echo(yaml.safe_dump(content, allow_unicode=True, sort_keys=False).rstrip())
    schema = task.schema()
    for side in ("inputs", "outputs"):
        typer.echo(f"{side}:")
        for slot, kind in schema[side]["properties"].items():
            need = "" if slot in schema[side]["required"] else " (optional)"
            typer.echo(f"  {slot}: [{task.slots[slot].type}] {kind.get('enum', '')}{need}".rstrip())
