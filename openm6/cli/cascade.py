"""openm6 cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, find, find_task
from openm6.cli.output import Json, emit, pairs, table
from openm6.core.files import require_new

cascade = typer.Typer(help="A small model on the edge that asks a large one when it is not sure.", no_args_is_help=True)
app.add_typer(cascade, name="cascade")

Place = Annotated[Path, typer.Argument(help="The box's folder.")]


@cascade.command()
def init(
    box: Place,
    model: Annotated[str, typer.Option(help=f"What answers here. {MODEL}")],
    cloud: Annotated[str | None, typer.Option(help="Address of the server that is asked what is not sure.")] = None,
    cloud_model: Annotated[
        str | None, typer.Option(help="The cloud's model, as --model: features are made for it.")
    ] = None,
    privacy: Annotated[
        str | None, typer.Option(help="What may be sent: all (as long as nothing else is said), features or nothing.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of a weight: 8, 4, or 32.")] = 8,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of box.toml, as keep_mb=64; several times.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a box: a folder to copy to the edge, with a program that serves it."""
    from openm6.edge.settings import settings_of

    require_new(box)
    options = {name: value for name, value in (("cloud", cloud), ("privacy", privacy)) if value is not None}
    settings = settings_of({name: _value(name, text) for name, text in {**pairs(setting or []), **options}.items()})
    place, of_cloud = find(model), find(cloud_model) if cloud_model else None

    from openm6.compress.cascade import init_box

    made = init_box(box, place, settings, None if bits == 32 else bits, of_cloud)
    if json:
        emit({"box": str(made.path), "version": made.version})
    else:
        typer.echo(f"{box}: calibrate its tasks (openm6 cascade calibrate), then: python {box / 'openm6-edge'} serve")


def _value(name: str, text: str) -> Any:
    """The value of a setting as TOML reads it; the text itself where the setting is a text, or TOML reads no value."""
    import tomllib

    from openm6.edge.settings import Settings

    try:
        found = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    is_text = isinstance(getattr(Settings(), name, None), str)
    return text if len(found) > 1 or (is_text and not isinstance(found["x"], str)) else found["x"]


@cascade.command()
def calibrate(
    box: Place,
    task: Annotated[str, typer.Option(help="A task of its model.")],
    data: Annotated[str, typer.Option(help="Records with answers that the model was not trained on.")],
    records: Annotated[int, typer.Option(min=50, help="Of them, so many.")] = 500,
    max_loss: Annotated[
        str, typer.Option(help="Wrong answers, of all, that may be given without asking: 0.4%, or 0.004.")
    ] = "0.4%",
    column: Annotated[list[str] | None, typer.Option("--column", "-c", help="slot=column, when names differ.")] = None,
    json: Json = False,
) -> None:
    """Find out when a task's answers are sure enough."""
    from openm6.cli.output import share
    from openm6.data.source import check_source
    from openm6.edge.box import Box

    opened, columns, most = Box(box), pairs(column or []), share(max_loss, "--max-loss")
    find_task(opened.folder() / "package", task)
    check_source(data)

    from openm6.compress.cascade import calibrate_box

    found = calibrate_box(opened, task, data, columns, records, most)
    if json:
        emit(found)
    else:
        typer.echo(
            f"{task}: {found['alone']:.1%} right alone; {found['sent']:.1%} would be asked of the cloud, "
            f"{found['wrong']:.2%} of all be wrong all the same."
        )


@cascade.command()
def learn(
    box: Place,
    data: Annotated[
        list[str] | None, typer.Option(help="task=SOURCE that is not to be forgotten meanwhile; several times.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 400,
    batch_size: Annotated[int, typer.Option(min=1)] = 48,
    learning_rate: Annotated[float, typer.Option(min=0)] = 5e-4,
    seed: Annotated[int, typer.Option()] = 0,
    json: Json = False,
) -> None:
    """Learn of what the cloud answered; the new version answers if it is better. Killed, it goes on the next time."""
    from openm6.data.source import check_source
    from openm6.edge.box import Box

    Box(box)
    sources: dict[str, list[str]] = {}
    for entry in data or []:
        for task, source in pairs([entry]).items():
            check_source(source)
            sources.setdefault(task, []).append(source)

    from openm6.compress.cascade import learn as run
    from openm6.train.promotion import told_counts

    found = run(box, sources, steps, batch_size, learning_rate, seed)
    if json:
        emit(found)
        return
    rows = [[task, *(told.get(name, "") for name in _COLUMNS)] for task, told in found["tasks"].items()]
    table(["task", *(name.replace("_", " ") for name in _COLUMNS)], [[_told(cell) for cell in row] for row in rows])
    typer.echo(
        f"Version {found['version']} answers now." if found["better"]
        else f"Version {found['from']} goes on answering. {found['reason']}"
    )  # fmt: skip
    for task, told in found["tasks"].items():
        if passed_over := told.get("passed_over"):
            typer.echo(f"{task}: answers that were passed over: {told_counts(passed_over)}.")


_COLUMNS = ("learned", "held_out", "held_out_before", "held_out_after", "before", "after")


def _told(cell: Any) -> Any:
    return f"{cell:.3f}" if isinstance(cell, float) else cell


@cascade.command()
def status(box: Place, json: Json = False) -> None:
    """What a box is, what it has kept, and what serves it; nothing is changed by looking."""
    from openm6.edge.status import status_of

    told = status_of(box)
    if json:
        emit(told)
        return
    kept, settings = told.pop("kept"), told.pop("settings")
    rows = {**told, **{f"kept: {name}": value for name, value in kept.items()}, **settings}
    table(["", ""], [[name, str(value)] for name, value in rows.items()], str(box))


@cascade.command()
def rollback(box: Place, json: Json = False) -> None:
    """Let the version before answer again."""
    from openm6.core.errors import UsageError
    from openm6.edge.box import Box

    opened = Box(box)
    before = [number for number in opened.versions if number < opened.version]
    if not before:
        raise UsageError(f"{box} has no version before {opened.version}.")
    opened.use(before[-1])
    emit({"version": before[-1]}) if json else typer.echo(f"Version {before[-1]} answers now.")
