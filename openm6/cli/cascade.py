"""openm6 cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, find, find_task
from openm6.cli.options import Column, Json
from openm6.cli.output import emit, pairs, share, table
from openm6.core.files import require_new

cascade = typer.Typer(help="Edge-cloud cascade: a small edge model defers to a large one.", no_args_is_help=True)
app.add_typer(cascade, name="cascade")

Place = Annotated[Path, typer.Argument(help="Folder of the edge device.")]


@cascade.command()
def init(
    device: Place,
    model: Annotated[str, typer.Option(help=f"The edge model. {MODEL}")],
    cloud: Annotated[
        str | None, typer.Option(help="URL of the server that uncertain requests are deferred to.")
    ] = None,
    cloud_model: Annotated[
        str | None, typer.Option(help="The cloud's model, as --model, for sending features instead of pixels.")
    ] = None,
    privacy: Annotated[
        str | None, typer.Option(help="Data that may be sent to the cloud: all, features or nothing. Default: all.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits per weight: 8, 4 or 32.")] = 8,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of edge.toml, e.g. keep_mb=64; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Create an edge device: a folder to copy to it, with a program that serves it."""
    from openm6.edge.device import settings_of

    require_new(device)
    options = {name: value for name, value in (("cloud", cloud), ("privacy", privacy)) if value is not None}
    settings = settings_of({name: _value(name, text) for name, text in {**pairs(setting or []), **options}.items()})
    place, of_cloud = find(model), find(cloud_model) if cloud_model else None

    from openm6.compress.cascade import create_device

    made = create_device(device, place, settings, None if bits == 32 else bits, of_cloud)
    if json:
        emit({"device": str(made.path), "version": made.version})
    else:
        typer.echo(
            f"{device}: calibrate its tasks (openm6 cascade calibrate), then: python {device / 'openm6-edge'} serve"
        )


def _value(name: str, text: str) -> Any:
    """The value parsed as TOML; the text itself if the setting is a string or the text is not a TOML value."""
    import tomllib

    from openm6.edge.device import Settings

    try:
        found = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    is_text = isinstance(getattr(Settings(), name, None), str)
    return text if len(found) > 1 or (is_text and not isinstance(found["x"], str)) else found["x"]


@cascade.command()
def calibrate(
    device: Place,
    task: Annotated[str, typer.Option(help="A task of the edge model.")],
    data: Annotated[str, typer.Option(help="Held-out records with answers.")],
    records: Annotated[int, typer.Option(min=50, help="Number of records to use.")] = 500,
    max_loss: Annotated[
        str, typer.Option(help="Largest fraction of all requests answered locally and wrongly: 0.4% or 0.004.")
    ] = "0.4%",
    column: Column = None,
    json: Json = False,
) -> None:
    """Choose the confidence above which a task is answered locally."""
    from openm6.data.source import check_source
    from openm6.edge.device import EdgeDevice

    opened, columns, most = EdgeDevice(device), pairs(column or []), share(max_loss, "--max-loss")
    find_task(opened.folder() / "package", task)
    check_source(data)

    from openm6.compress.cascade import calibrate_task

    found = calibrate_task(opened, task, data, columns, records, most)
    if json:
        emit(found)
    else:
        typer.echo(
            f"{task}: accuracy {found['alone']:.1%} without the cloud; {found['sent']:.1%} deferred, "
            f"{found['wrong']:.2%} answered locally and wrong."
        )


@cascade.command()
def learn(
    device: Place,
    data: Annotated[
        list[str] | None, typer.Option(help="task=SOURCE to rehearse against forgetting; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 48,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    json: Json = False,
) -> None:
    """Train on the cloud's answers; the new version goes live if it is better. An interrupted run is resumed."""
    from openm6.data.source import check_source
    from openm6.edge.device import EdgeDevice

    EdgeDevice(device)
    sources: dict[str, list[str]] = {}
    for entry in data or []:
        for task, source in pairs([entry]).items():
            check_source(source)
            sources.setdefault(task, []).append(source)

    from openm6.compress.cascade import learn as run
    from openm6.train.promotion import told_counts

    found = run(device, sources, steps, batch_size, learning_rate, seed)
    if json:
        emit(found)
        return
    columns = ("learned", "held_out", "held_out_before", "held_out_after", "before", "after")
    rows = [[task, *(_cell(figures.get(name, "")) for name in columns)] for task, figures in found["tasks"].items()]
    table(["task", *(name.replace("_", " ") for name in columns)], rows)
    typer.echo(
        f"Version {found['version']} is live." if found["better"]
        else f"Version {found['from']} stays live. {found['reason']}"
    )  # fmt: skip
    for task, figures in found["tasks"].items():
        if skipped := figures.get("skipped"):
            typer.echo(f"{task}: skipped answers: {told_counts(skipped)}.")


def _cell(cell: Any) -> Any:
    return f"{cell:.3f}" if isinstance(cell, float) else cell


@cascade.command()
def status(device: Place, json: Json = False) -> None:
    """Show the settings, stored answers and serving process of an edge device, without changing it."""
    from openm6.edge.status import status_of

    figures = status_of(device)
    if json:
        emit(figures)
        return
    kept, settings = figures.pop("kept"), figures.pop("settings")
    rows = {**figures, **{f"kept: {name}": value for name, value in kept.items()}, **settings}
    table(["", ""], [[name, str(value)] for name, value in rows.items()], str(device))


@cascade.command()
def rollback(device: Place, json: Json = False) -> None:
    """Go back to the previous version."""
    from openm6.core.errors import UsageError
    from openm6.edge.device import EdgeDevice

    opened = EdgeDevice(device)
    before = [number for number in opened.versions if number < opened.version]
    if not before:
        raise UsageError(f"{device} has no version before {opened.version}.")
    opened.use(before[-1])
    emit({"version": before[-1]}) if json else typer.echo(f"Version {before[-1]} is live.")
