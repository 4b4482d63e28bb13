"""The HTTP API of the platform: jobs, the catalogue, the lineage of deployed models, and reports of edge devices, which
hold counts and averages by task, but no inputs or answers. A change needs a key that manages, a report any key."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import Field, StringConstraints

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.hub.catalogue import DATA, MODEL, Catalogue, Lineage, Version
from openm6.hub.jobs import ENGINES, Jobs, describe_job
from openm6.serve.bodies import Fields
from openm6.serve.server import Manager, Server, User

TAIL = 100_000
"""Maximum number of bytes of a log tail."""
MOST_EDGES = 10_000
"""Maximum number of edge devices that are remembered; those with the oldest reports are dropped."""

Kind = Literal["data", "models"]
KINDS = {"data": DATA, "models": MODEL}

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]


class JobRequest(Fields):
    command: list[str] = Field(
        min_length=1, max_length=200, description="of openm6, word by word: finetune, goods@1, ..."
    )
    name: str = Field("", max_length=200)
    engine: Literal[ENGINES] = Field("here", description="a process of this machine, or a Ray cluster")  # type: ignore[valid-type]
    gpus: int = Field(0, ge=0, le=64, description="on Ray")


class VersionRequest(Fields):
    name: str
    place: str = Field(min_length=1, description="data: a source; a model: its directory on the server")
    made_of: list[str] = Field(default_factory=list, description="of a model: goods@1, data:items@2")
    metrics: dict[str, float] = Field(default_factory=dict)
    note: str = Field("", max_length=2000)


class Statistics(Fields):
    """A report: numbers alone, with no field for a text or a picture."""

    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
    seconds: float = Field(ge=0, description="covered by the counts")
    tasks: dict[Word, dict[Word, Number]] = Field(max_length=256)


def add_hub(app: FastAPI, server: Server) -> None:
    """Add the routes. They are plain functions, which FastAPI runs in threads, because they wait for files and
    databases."""
    jobs, catalogue, known = Jobs(), Catalogue(), OrderedDict[str, dict[str, Any]]()

    @app.get("/v1/jobs")
    def list_jobs(_: User) -> dict[str, Any]:
        """All jobs with their states, the oldest first."""
        return {"object": "list", "data": [describe_job(job) for job in jobs.list()]}

    @app.post("/v1/jobs", status_code=201)
    def submit(asked: JobRequest, _: Manager) -> dict[str, Any]:
        """Queue a command of openm6."""
        return describe_job(jobs.submit(asked.command, asked.name, engine=asked.engine, gpus=asked.gpus))

    @app.get("/v1/jobs/{identity}")
    def job(identity: str, _: User) -> dict[str, Any]:
        """One job."""
        return describe_job(jobs.get(identity))

    @app.get("/v1/jobs/{identity}/log")
    def log(identity: str, _: User) -> PlainTextResponse:
        """The log tail of a job."""
        return PlainTextResponse(jobs.last_said(jobs.get(identity), TAIL))

    @app.post("/v1/jobs/{identity}/stop")
    def stop(identity: str, _: Manager) -> dict[str, Any]:
        """Stop a job; it can be resumed."""
        return describe_job(jobs.stop(identity))

    @app.post("/v1/jobs/{identity}/resume")
    def resume(identity: str, _: Manager) -> dict[str, Any]:
        """Queue a stopped or failed job again."""
        return describe_job(jobs.resume(identity))

    @app.delete("/v1/jobs/{identity}", status_code=204)
    def remove(identity: str, _: Manager) -> None:
        """Remove a finished job."""
        jobs.remove(identity)

    @app.get("/v1/catalogue/{kind}")
    def names(kind: Kind, _: User) -> dict[str, Any]:
        """All versions of all data sets, or models."""
        return {"object": "list", "data": [_version(one) for one in catalogue.every(KINDS[kind])]}

    @app.get("/v1/catalogue/{kind}/{name}")
    def one(kind: Kind, name: str, _: User) -> dict[str, Any]:
        """A version (NAME@3, NAME@live, or the last one of NAME) with its whole lineage."""
        return _lineage(catalogue.lineage(catalogue.named(name, KINDS[kind])))

    @app.post("/v1/catalogue/{kind}", status_code=201)
    def add(kind: Kind, asked: VersionRequest, _: Manager) -> dict[str, Any]:
        """Add a version."""
        if kind == "data":
            return _version(catalogue.add_data(asked.name, asked.place))
        values = asked.model_dump(exclude={"place"})
        return _version(catalogue.add_model(directory=Path(asked.place), **values))

    @app.get("/v1/models/{name}/lineage")
    def lineage(name: str, _: User) -> dict[str, Any]:
        """The lineage of a deployed model, back to its data."""
        place = server.fleet.get(name).place.model
        version = catalogue.version_at(place)
        if version is None:
            message = f"{name} is served from a directory outside of the catalogue."
            raise Refusal(ErrorKind.NOT_FOUND, message, "not_in_catalogue")
        return _lineage(catalogue.lineage(version))

    @app.post("/v1/edges/{name}")
    async def tell(name: str, told: Statistics, key: User) -> dict[str, Any]:
        """Report the counts of an edge device, in place of its previous report."""
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or len(name) > 64:
            message = "The name of an edge device has at most 64 characters: letters, digits, - _ and ."
            raise UsageError(message, param="name")
        known[name] = {"name": name, "key": key.name, "heard": round(time.time()), **told.model_dump()}
        known.move_to_end(name)
        while len(known) > MOST_EDGES:
            known.popitem(last=False)
        return {"object": "edge", "name": name}

    @app.get("/v1/edges")
    async def edges(_: Manager) -> dict[str, Any]:
        """The edge devices that have reported since this server started."""
        return {"object": "list", "data": list(known.values())}


def _version(one: Version) -> dict[str, Any]:
    return {
        "name": one.name, "version": one.number, "aliases": list(one.aliases), "created": one.created,
        "made_of": [f"{'data:' if kind == DATA else ''}{name}@{number}" for kind, name, number in one.made_of],
        **one.about,
    }  # fmt: skip


def _lineage(one: Lineage) -> dict[str, Any]:
    return {**_version(one.version), "kind": one.version.kind, "made_of": [_lineage(part) for part in one.made_of]}
