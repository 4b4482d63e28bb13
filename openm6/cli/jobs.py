"""openm6 jobs."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.options import Json
from openm6.cli.output import emit, table

jobs = typer.Typer(help="Job queue: commands that run in the background, one after the other.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

Identity = Annotated[str, typer.Argument(help="Id of the job, or a unique prefix.")]


@jobs.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    name: Annotated[str, typer.Option("--name", help="Name of the job. Options stand before the command.")] = "",
    engine: Annotated[str, typer.Option("--engine", help="here, or ray: the cluster at $RAY_ADDRESS.")] = "here",
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="Number of GPUs to reserve on Ray.")] = 0,
) -> None:
    """Submit a command to the queue: `openm6 jobs submit train recipe.yaml train.steps=500`"""
    from openm6.hub.jobs import Jobs

    job = Jobs().submit(context.args, name, engine=engine, gpus=gpus)
    typer.echo(job.id)
    typer.echo("It is queued for `openm6 jobs work` or for a server on this machine.", err=True)


@jobs.command("list")
def list_jobs(json: Json = False) -> None:
    """List all jobs and their progress."""
    from openm6.hub.jobs import Jobs, describe_job

    found = [describe_job(job) for job in Jobs().list()]
    if json:
        emit(found)
        return
    rows = [[one["id"], one["name"], one["state"], _far(one), one["message"][:60]] for one in found]
    table(["id", "name", "state", "progress", ""], rows)


@jobs.command()
def show(identity: Identity, json: Json = False) -> None:
    """Show a job."""
    from openm6.hub.jobs import Jobs, describe_job

    found = describe_job(Jobs().get(identity))
    if json:
        emit(found)
    else:
        table(["", ""], [[name, value] for name, value in found.items()], found["id"])


@jobs.command()
def logs(
    identity: Identity,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the job ends.")] = False,
) -> None:
    """Print the log of a job."""
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
    """Stop a job; `resume` continues it."""
    from openm6.hub.jobs import Jobs

    typer.echo(f"{Jobs().stop(identity).id} is stopped.")


@jobs.command()
def resume(identity: Identity) -> None:
    """Queue a stopped or failed job again; it continues where it was."""
    from openm6.hub.jobs import Jobs

    typer.echo(f"{Jobs().resume(identity).id} is queued.")


@jobs.command()
def remove(identity: Identity) -> None:
    """Remove a finished job and its log; its output stays."""
    from openm6.hub.jobs import Jobs

    Jobs().remove(identity)
    typer.echo(f"{identity} is removed.")


@jobs.command()
def work(
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Number of jobs to run in parallel.")] = 1,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Exit when the queue is empty.")] = False,
) -> None:
    """Run a queue worker: start queued jobs. Running jobs outlive the worker."""
    from openm6.hub.jobs import Jobs

    Jobs().work(at_once, until_empty)


def _far(one: dict[str, Any]) -> str:
    far = one["progress"]
    if not far:
        return "" if one["seconds"] is None else f"{one['seconds']} s"
    return f"{far['step']}/{far['steps']}, loss {far['loss']:.3f}, {far['seconds_left'] / 60:.0f} min left"
