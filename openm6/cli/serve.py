"""openm6 serve, keys, deploy, deployments."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL
from openm6.cli.options import Json
from openm6.cli.output import emit, pairs, table, tell
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.extras import require
from openm6.core.files import require_writable
from openm6.core.origins import LOOPBACK
from openm6.hub.catalogue import find_model
from openm6.hub.deployments import Deployments, Plan, write
from openm6.hub.jobs import Jobs
from openm6.serve.keys import Keys

if TYPE_CHECKING:
    from fastapi import FastAPI

KEYS = Path.home() / ".config" / "openm6" / "keys.json"

KeysFile = Annotated[Path, typer.Option("--keys", help="Key file.")]


@app.command()
def serve(
    model: Annotated[list[str], typer.Argument(help=f"{MODEL} NAME=MODEL sets the name in the API.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter of the first model, NAME=DIRECTORY; repeatable.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Key file (openm6 keys); without one requests are not authenticated.")
    ] = None,
    cache_mib: Annotated[int, typer.Option(min=16, help="KV cache per model in MiB.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Maximum running plus queued requests per model.")] = 256,
    jobs: Annotated[int, typer.Option(min=0, help="Jobs of the queue to run in parallel; 0: none.")] = 1,
    batches: Annotated[Path, typer.Option(help="Console: root folder of the batches to review.")] = Path("runs"),
    console: Annotated[bool, typer.Option(help="Serve the web console at the address of the API.")] = True,
    traces: Annotated[bool, typer.Option(help="Send OpenTelemetry traces to $OTEL_EXPORTER_OTLP_ENDPOINT.")] = False,
    linger: Annotated[
        float, typer.Option(min=0, help="Seconds after SIGTERM in which new requests get 503 before the socket closes.")
    ] = 3.0,
    image_host: Annotated[
        list[str] | None, typer.Option(help="Host from which pictures may be fetched; repeatable. Default: none.")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Origin allowed to call the API (CORS), https://shop.example; repeatable.")
    ] = None,
) -> None:
    """Serve a model behind an HTTP API and a web console: `openm6 serve runs/demo/model`"""
    begun = time.monotonic()
    require("serve", "fastapi", "uvicorn", "prometheus_client", "msgpack", "httptools", "multipart")
    check_reach(host, keys)
    check_origins(origin or [])
    adapters = {name: find_model(path)[0] for name, path in pairs(adapter or []).items()}
    found: dict[str, Path] = {}
    for one in model:
        name, _, path = one.rpartition("=")
        place, called = find_model(path)
        name = name or called
        if name in found:
            raise UsageError(f"Two models are called {name}: name them by NAME=DIRECTORY.")
        found[name] = place

    import asyncio

    import uvicorn

    from openm6.serve.api import create_app
    from openm6.serve.figures import add_traces
    from openm6.serve.fleet import Fleet
    from openm6.serve.listen import Connection, LingeringServer, bind
    from openm6.serve.server import Options
    from openm6.serve.wire import Place, Settings

    sockets = bind(host, port)
    places = {name: Place(place, {} if number else adapters) for number, (name, place) in enumerate(found.items())}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = Options(keys=keys, hosts=tuple(image_host or ()), loopback=keys is None, origins=tuple(origin or ()))
    beside = [partial(work_beside, jobs)] if jobs else []

    async def announce() -> None:
        """Print one line when the server is ready, then build the console's pages as soon as no request is open."""
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://{f'[{host}]' if ':' in host else host}:{sockets[0].getsockname()[1]}"
        line = f"Serving {', '.join(found)} at {url} after {time.monotonic() - begun:.1f} s"
        typer.echo(f"{line} (console: {url}/)" if pages else line)
        if pages:
            await asyncio.sleep(1)  # requests that waited for the server come first
            while any(one.open_requests for one in fleet.deployments.values()):
                await asyncio.sleep(1)
            await pages()

    fleet = Fleet(Settings(cache_mib=cache_mib), queue)
    application = create_app(fleet, options, places, [announce, *beside])
    if traces:
        add_traces(application)
    pages = _mount(application, batches) if console else None
    # uvicorn drains, then raises the signal again for the previous handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(
        application, http=Connection, log_level="warning", access_log=False,
        timeout_graceful_shutdown=round(options.drain),
    )  # fmt: skip
    server = LingeringServer(config, fleet, linger)
    with suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        raise typer.Exit(1)


async def work_beside(at_once: int) -> None:
    """Run the job queue as long as the server runs; running jobs outlive it."""
    import asyncio

    every = Jobs()
    while True:
        with suppress(OpenM6Error):  # a full disk or missing folder may be temporary
            await asyncio.to_thread(every.step, at_once)
        await asyncio.sleep(1)


def _mount(application: FastAPI, batches: Path) -> Callable[[], Awaitable[object]] | None:
    """Add the console to the server. Returns the coroutine function that builds its pages, None if it is not
    installed."""
    from openm6.console import add_console

    try:
        return add_console(application, application.state.server, batches)
    except UsageError as error:
        typer.echo(f"Without the console: {error}", err=True)
        return None


def check_reach(host: str, keys: Path | None) -> None:
    """Raises UsageError for a server that other machines could use without a key."""
    if keys is None and host not in LOOPBACK:
        raise UsageError(f"{host} is reachable from other machines: give --keys FILE (made by `openm6 keys add`).")


def check_origins(origins: list[str]) -> None:
    """Raises UsageError for a text that a browser would not send as an origin."""
    for one in origins:
        if (sent := _origin_of(one)) != one:
            form = sent or "https://shop.example, with a port if it has one"
            raise UsageError(f"{one} is not an origin of web pages: write it as {form}.")


def _origin_of(address: str) -> str:
    """The origin of a URL as browsers send it: lower case, ASCII, without the default port; "" if it has none."""
    ports = {"http": 80, "https": 443}
    try:
        parts = urlsplit(address)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        return ""
    if parts.scheme not in ports or not host:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, ports[parts.scheme]) else f":{port}")


keys_app = typer.Typer(help="API keys with roles and limits.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Name of the key's owner.")],
    role: Annotated[str, typer.Option(help="use: requests; manage: also models, data and jobs.")] = "use",
    per_minute: Annotated[int, typer.Option(min=0, help="Maximum requests per minute; 0: no limit.")] = 0,
    per_day: Annotated[int, typer.Option(min=0, help="Maximum tokens per day; 0: no limit.")] = 0,
    keys: KeysFile = KEYS,
) -> None:
    """Create a key and print it; it cannot be shown again."""
    typer.echo(Keys(keys).add(name, role, per_minute, per_day))


@keys_app.command("remove")
def remove_key(name: Annotated[str, typer.Argument(help="Name of the key's owner.")], keys: KeysFile = KEYS) -> None:
    """Revoke a key; running servers refuse it at once."""
    Keys(keys).remove(name)
    typer.echo(f"The key of {name} is revoked.")


@keys_app.command("list")
def list_keys(keys: KeysFile = KEYS, json: Json = False) -> None:
    """List the keys with today's usage (UTC) and what is left."""
    from openm6.serve.meter import Meter

    file = Keys(keys)
    meter = Meter(file.spent if file.spent.is_file() else None)
    rows = []
    for key in file.list():
        spent = meter.spent(key)
        left = max(0, key.per_day - spent) if key.per_day else None
        rows.append((key.name, key.role, key.per_minute, key.per_day, spent, left))
    if json:
        names = ("name", "role", "per_minute", "per_day", "spent_today", "left_today")
        emit([dict(zip(names, row, strict=True)) for row in rows])
    else:
        columns = ["name", "role", "requests per minute", "tokens per day", "spent today", "left today"]
        table(columns, ((*row[:5], "no limit" if row[5] is None else row[5]) for row in rows))


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
    directory, called = find_model(model)
    name = name or called
    _tell_licence(directory)
    if to == "here":
        more = ("--keys", str(keys)) if keys else ()
        made = Deployments().start(name, directory, host, port, more)
        tell(json, {"name": made.name, "url": made.url}, f"{made.name} is served at {made.url}")
        return
    if to == "ray":
        from openm6.serve.on_ray import deploy_on_ray
        from openm6.serve.server import Options

        check_reach(host, keys)
        url = deploy_on_ray(
            name, directory, Options(keys=keys, loopback=keys is None), replicas=replicas,
            most=max(most, replicas), host=host, port=port or 8000, address=os.environ.get("RAY_ADDRESS"),
        )  # fmt: skip
        tell(json, {"name": name, "url": url}, f"{name} is served at {url}")
        return
    require_writable(output)
    service, chosen = name.replace("_", "-").lower(), {"image": image} if image else {}
    plan = Plan(service, replicas=replicas, most=max(most, replicas), **chosen)  # type: ignore[arg-type]
    files = write(to, plan, output, directory, keys or KEYS)
    tell(json, {"files": list(map(str, files))}, "\n".join(map(str, files)))


def _tell_licence(directory: Path) -> None:
    from openm6.tasks.card import read_origin
    from openm6.weights.origin import licence_note

    if note := licence_note(read_origin(directory)):
        typer.echo(note, err=True)


deployments = typer.Typer(help="Models served in the background of this machine.", no_args_is_help=True)
app.add_typer(deployments, name="deployments")


@deployments.command("list")
def list_deployments(json: Json = False) -> None:
    """List the deployments of this machine."""
    names = ["name", "url", "model", "state", "since"]
    rows = [
        (one.name, one.url, one.model, "serving" if one.lives else "exited", time.ctime(one.created))
        for one in Deployments().list()
    ]
    emit([dict(zip(names, row, strict=True)) for row in rows]) if json else table(names, rows)


@deployments.command()
def stop(name: Annotated[str, typer.Argument(help="Name of the deployment.")]) -> None:
    """Stop a deployment after its running requests."""
    Deployments().stop(name)
    typer.echo(f"{name} is stopped.")
