"""openm6 serve, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli import app
from openm6.cli.output import Json, emit, pairs, table
from openm6.errors import UsageError

KEYS = Path.home() / ".config" / "openm6" / "keys.json"
LOOPBACK = ("127.0.0.1", "::1", "localhost")

KeysFile = Annotated[Path, typer.Option("--keys", help="File of the keys.")]


@app.command()
def serve(
    model: Annotated[
        list[str], typer.Argument(help="A model directory, or one of the catalogue (goods@live); NAME=... names it.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIRECTORY of an adapter of the first model; several times.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of keys (openm6 keys); without one nobody is asked.")] = None,
    cache_mib: Annotated[int, typer.Option(min=16, help="Memory for texts that are being written.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait at most; further ones are refused.")] = 256,
    image_host: Annotated[
        list[str] | None, typer.Option(help="Host from which pictures may be fetched; none by default.")
    ] = None,
) -> None:
    """Put a model behind an API: `openm6 serve runs/demo/model`"""
    import logging
    import signal

    import uvicorn

    from openm6.serve.api import create_app
    from openm6.serve.engine import Settings
    from openm6.serve.fleet import Fleet, Place
    from openm6.serve.server import Options

    check_reach(host, keys)
    adapters = {name: Path(path) for name, path in pairs(adapter or []).items()}
    places = {}
    for number, one in enumerate(model):
        name, _, path = one.rpartition("=")
        place, called = _directory(path)
        name = name or called
        if name in places:
            raise UsageError(f"Two models are called {name}: say NAME=DIRECTORY.")
        places[name] = Place(place, adapters if number == 0 else {})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = Options(keys=keys, hosts=tuple(image_host or ()))
    application = create_app(Fleet(Settings(cache_mib=cache_mib, queue=queue)), options, places)
    # uvicorn drains, then raises the signal once more, to whoever was there before: it has been seen to.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(application, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=30)


def check_reach(host: str, keys: Path | None) -> None:
    """Raises UsageError where others could ask without a key."""
    if keys is None and host not in LOOPBACK:
        raise UsageError(f"{host} can be reached by others: give --keys FILE (`openm6 keys add` makes one).")


def _directory(path: str) -> tuple[Path, str]:
    """A model's directory and what to call it: given as it is, or by the catalogue's NAME@N."""
    place = Path(path)
    if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
        return place.resolve(), place.resolve().parent.name if place.name == "model" else place.name
    if "@" not in path or place.exists():
        raise UsageError(f"{path} is no model directory.")
    from openm6.hub.catalogue import Catalogue

    catalogue = Catalogue()
    version = catalogue.named(path)
    return catalogue.local(version).resolve(), version.name


keys_app = typer.Typer(help="Keys of the API.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    role: Annotated[str, typer.Option(help="use, or manage: exchange models too.")] = "use",
    per_minute: Annotated[int, typer.Option(min=0, help="Requests a minute at most; 0: any number.")] = 0,
    per_day: Annotated[int, typer.Option(min=0, help="Tokens a day at most; 0: any number.")] = 0,
    keys: KeysFile = KEYS,
) -> None:
    """A new key, shown this once."""
    from openm6.serve.keys import Keys

    typer.echo(Keys(keys).add(name, role, per_minute, per_day))


@keys_app.command("remove")
def remove_key(name: Annotated[str, typer.Argument(help="Whose it is.")], keys: KeysFile = KEYS) -> None:
    """A key that is valid no more."""
    from openm6.serve.keys import Keys

    Keys(keys).remove(name)
    typer.echo(f"{name} has no key any more.")


@keys_app.command("list")
def list_keys(keys: KeysFile = KEYS, json: Json = False) -> None:
    """Whose keys there are."""
    from openm6.serve.keys import Keys

    rows = [(key.name, key.role, key.per_minute, key.per_day) for key in Keys(keys).list()]
    if json:
        emit([dict(zip(("name", "role", "per_minute", "per_day"), row, strict=True)) for row in rows])
    else:
        table(["name", "role", "a minute", "tokens a day"], rows)
