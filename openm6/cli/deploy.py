"""openm6 deploy."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL
from openm6.cli.options import Json
from openm6.cli.output import emit, table
from openm6.cli.serve import KEYS, check_reach
from openm6.core.files import require_writable


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help=MODEL)],
    to: Annotated[
        str, typer.Option(help="here: a background process; compose, k8s: files to write; ray: a Ray cluster.")
    ] = "here",
    name: Annotated[str, typer.Option(help="Name of the service. Default: the model's directory.")] = "",
    host: Annotated[str, typer.Option(help="here, ray: address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="here, ray: port; 0: any free port here, 8000 on Ray.")
    ] = 0,
    keys: Annotated[Path | None, typer.Option(help="Key file (openm6 keys).")] = None,
    output: Annotated[Path, typer.Option(help="compose, k8s: folder for the files.")] = Path("deploy"),
    image: Annotated[str, typer.Option(help="compose, k8s: container image. Default: openm6:VERSION.")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="k8s, ray: minimum number of servers.")] = 2,
    most: Annotated[int, typer.Option(min=1, help="k8s, ray: maximum number of servers.")] = 8,
    json: Json = False,
) -> None:
    """Serve a model in the background, or write the files to deploy it elsewhere: `openm6 deploy runs/demo/model`"""
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


deployments = typer.Typer(help="Models served in the background of this machine.", no_args_is_help=True)
app.add_typer(deployments, name="deployments")


@deployments.command("list")
def list_deployments(json: Json = False) -> None:
    """List the deployments of this machine."""
    from openm6.hub.deployments import Deployments

    rows = [
        (one.name, one.url, one.model, "serving" if one.lives else "exited", time.ctime(one.created))
        for one in Deployments().list()
    ]
    if json:
        emit([dict(zip(("name", "url", "model", "state", "since"), row, strict=True)) for row in rows])
    else:
        table(["name", "url", "model", "state", "since"], rows)


@deployments.command()
def stop(name: Annotated[str, typer.Argument(help="Name of the deployment.")]) -> None:
    """Stop a deployment after its running requests."""
    from openm6.hub.deployments import Deployments

    Deployments().stop(name)
    typer.echo(f"{name} is stopped.")
