"""openm6 deploy."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.cli.output import Json, emit, table
from openm6.cli.serve import KEYS, check_reach
from openm6.core.files import require_writable


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="A model directory, or one of the catalogue (goods@live).")],
    to: Annotated[str, typer.Option(help="here, compose, k8s or ray.")] = "here",
    name: Annotated[str, typer.Option(help="Of the service; by default of the directory.")] = "",
    host: Annotated[str, typer.Option(help="Here: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Here: port; 0: any that is free.")] = 0,
    keys: Annotated[Path | None, typer.Option(help="File of keys (openm6 keys).")] = None,
    output: Annotated[Path, typer.Option(help="Elsewhere: folder for the files.")] = Path("deploy"),
    image: Annotated[str, typer.Option(help="Elsewhere: the container image.")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="k8s: servers at least.")] = 2,
    most: Annotated[int, typer.Option(min=1, help="k8s: servers at most.")] = 8,
    json: Json = False,
) -> None:
    """Serve a model in the background, or write what puts it to work elsewhere: `openm6 deploy runs/demo/model`"""
    from openm6.hub.deployments import Deployments
    from openm6.hub.find import find_model
    from openm6.hub.manifests import Plan, write

    directory, called = find_model(model)
    name = name or called
    if to == "here":
        more = ("--keys", str(keys)) if keys else ()
        made = Deployments().start(name, directory, host, port, more)
        emit({"name": made.name, "url": made.url}) if json else typer.echo(f"{made.name} is served at {made.url}")
        return
    if to == "ray":
        from openm6.serve.on_ray import deploy_on_ray
        from openm6.serve.server import Options
        from openm6.serve.settings import Place

        check_reach(host, keys)
        url = deploy_on_ray(
            name, {name: Place(directory)}, Options(keys=keys, loopback=keys is None), replicas=replicas,
            most=max(most, replicas), host=host, port=port or 8000, address=os.environ.get("RAY_ADDRESS"),
        )  # fmt: skip
        emit({"name": name, "url": url}) if json else typer.echo(f"{name} is served at {url}")
        return
    require_writable(output)
    service, chosen = name.replace("_", "-").lower(), {"image": image} if image else {}
    plan = Plan(service, replicas=replicas, most=max(most, replicas), **chosen)  # type: ignore[arg-type]
    files = write(to, plan, output, directory, keys or KEYS)
    emit({"files": list(map(str, files))}) if json else typer.echo("\n".join(map(str, files)))


deployments = typer.Typer(help="Models that are served here in the background.", no_args_is_help=True)
app.add_typer(deployments, name="deployments")


@deployments.command("list")
def list_deployments(json: Json = False) -> None:
    """List the models that are served here in the background."""
    from openm6.hub.deployments import Deployments

    rows = [
        (one.name, one.url, one.model, "serves" if one.lives else "has ended", time.ctime(one.created))
        for one in Deployments().list()
    ]
    if json:
        emit([dict(zip(("name", "url", "model", "state", "since"), row, strict=True)) for row in rows])
    else:
        table(["name", "url", "model", "", "since"], rows)


@deployments.command()
def stop(name: Annotated[str, typer.Argument(help="Which.")]) -> None:
    """End a deployment, after the requests that it works at."""
    from openm6.hub.deployments import Deployments

    Deployments().stop(name)
    typer.echo(f"{name} is not served any more.")
