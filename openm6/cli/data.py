"""openm6 data."""

from __future__ import annotations

from typing import Annotated

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.checks import MODEL, find
from openm6.cli.output import counted, emit, pairs, table

data = typer.Typer(help="Check data before training; the catalogue of data sets.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def check(
    source: Annotated[str, typer.Argument(help="Path, URL or glob, or built-in data such as demo:questions/test.")],
    task: Annotated[str, typer.Option(help="Task to check the data for, by name or YAML path.")],
    column: options.Column = None,
    data_format: options.Format = None,
    images: options.Images = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    no_cache: options.NoCache = False,
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
    from openm6.data.readers import with_options
    from openm6.tasks.library import get

    reading = {"--format": data_format, "--images": images, "--encoding": encoding, "--names": names}
    reading_words = [word for name, value in reading.items() if value for word in (name, value)]
    command = check_command(source, task, *reading_words)
    processor, known = None, {}
    if model is not None:
        place = find(model)

        from openm6.weights.directory import open_processor

        processor, own = open_processor(place)
        known = {one.name: one for one in own}
    chosen = known.get(task) or get(task)
    data_format = with_options(data_format, encoding, names)
    checked = Check(source, chosen, pairs(column or []), data_format, images, limit, command, processor, against)
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
def add(
    name: Annotated[str, typer.Argument(help="Name of the data set: letters, digits, - and _.")],
    source: Annotated[str, typer.Argument(help="Path, URL or glob, or built-in data such as demo:questions/test.")],
    data_format: options.Format = None,
    images: options.Images = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    no_cache: options.NoCache = False,
    json: options.Json = False,
) -> None:
    """Register a data set in the catalogue with its schema and hash; the files stay in place. An unchanged data set
    gets no new version."""
    from openm6.data.readers import with_options
    from openm6.hub.catalogue import Catalogue

    version = Catalogue().add_data(name, source, with_options(data_format, encoding, names), images)
    if json:
        emit({"name": version.name, "version": version.number, **version.about})
    else:
        typer.echo(f"{version.full_name}: {version.about['records']} records, {version.about['hash'][:12]}")


@data.command("list")
def list_data(json: options.Json = False) -> None:
    """List the data sets of the catalogue, the latest version of each."""
    from openm6.hub.catalogue import DATA, Catalogue

    catalogue = Catalogue()
    last = [catalogue.named(name, DATA) for name in catalogue.names(DATA)]
    if json:
        emit([{"name": v.name, "version": v.number, **v.about} for v in last])
    else:
        table(["name", "version", "records", "source"], [
            (v.name, v.number, v.about["records"], v.about["source"]) for v in last
        ])  # fmt: skip


@data.command()
def show(name: Annotated[str, typer.Argument(help="NAME, or NAME@3.")], json: options.Json = False) -> None:
    """Show a data set of the catalogue: columns, records, hash, source."""
    from openm6.hub.catalogue import DATA, Catalogue

    version = Catalogue().named(name, DATA)
    if json:
        emit({"name": version.name, "version": version.number, "created": version.created, **version.about})
        return
    rows = [(key, value) for key, value in version.about.items() if key != "columns"]
    rows += [(f"column {column}", kind) for column, kind in version.about["columns"].items()]
    table(["", ""], rows, version.full_name)
