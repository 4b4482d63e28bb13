"""openm6 jobs."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.output import Json, emit, table

jobs = typer.Typer(help="Commands that wait for their turn and outlive this terminal.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

Identity = Annotated[str, typer.Argument(help="Its id, or the beginning of it.")]


@jobs.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    name: Annotated[str, typer.Option("--name", help="What to call it; before the command.")] = "",
    engine: Annotated[str, typer.Option("--engine", help="here, or ray: on the cluster at $RAY_ADDRESS.")] = "here",
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="On Ray: GPUs that it needs.")] = 0,
) -> None:
    """Let a command wait for its turn: `openm6 jobs submit train recipe.yaml train.steps=500`"""
    from openm6.hub.jobs import Jobs

    job = Jobs().submit(context.args, name, engine=engine, gpus=gpus)
    typer.echo(job.id)
    typer.echo("It waits for `openm6 jobs work`, or for a server here.", err=True)


@jobs.command("list")
def list_jobs(json: Json = False) -> None:
    """All jobs and how far they are."""
    from openm6.hub.jobs import Jobs, told

    found = [told(job) for job in Jobs().list()]
    if json:
        emit(found)
        return
    rows = [[one["id"], one["name"], one["state"], _far(one), one["message"][:60]] for one in found]
    table(["id", "name", "state", "progress", ""], rows)


@jobs.command()
def show(identity: Identity, json: Json = False) -> None:
    """One job."""
    from openm6.hub.jobs import Jobs, told

    found = told(Jobs().get(identity))
    if json:
        emit(found)
    else:
        table(["", ""], [[name, value] for name, value in found.items()], found["id"])


@jobs.command()
def logs(
    identity: Identity, follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it is over.")] = False
) -> None:
    """What a job has said."""
    from openm6.hub.jobs import OVER, Jobs

    every = Jobs()
    job = every.get(identity)
    place = 0
    while True:
        over = every.get(job.id).state in OVER
        if every.log(job).is_file():
            with every.log(job).open("rb") as file:
                file.seek(place)
                sys.stdout.buffer.write(file.read())
                sys.stdout.flush()
                place = file.tell()
        if over or not follow:
            return
        time.sleep(0.5)


@jobs.command()
def stop(identity: Identity) -> None:
    """End a job; `resume` goes on with it."""
    from openm6.hub.jobs import Jobs

    typer.echo(f"{Jobs().stop(identity).id} is stopped.")


@jobs.command()
def resume(identity: Identity) -> None:
    """Go on with a job that was stopped or failed."""
    from openm6.hub.jobs import Jobs

    typer.echo(f"{Jobs().resume(identity).id} waits for its turn.")


@jobs.command()
def remove(identity: Identity) -> None:
    """Forget a job that is over; what it has made stays."""
    from openm6.hub.jobs import Jobs

    Jobs().remove(identity)
    typer.echo(f"{identity} is forgotten.")


@jobs.command()
def work(
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Jobs at the same time.")] = 1,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="End when nothing is left.")] = False,
) -> None:
    """The queue: start what waits. What it has started goes on when it ends."""
    from openm6.hub.jobs import Jobs

    Jobs().work(at_once, until_empty)


def _far(one: dict[str, Any]) -> str:
    far = one["progress"]
    if not far:
        return "" if one["seconds"] is None else f"{one['seconds']} s"
    return f"{far['step']}/{far['steps']}, loss {far['loss']:.3f}, {far['seconds_left'] / 60:.0f} min left"
