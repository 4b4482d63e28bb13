"""The HTTP API of the hub: jobs, the catalogue, and the lineage of deployed models. Reading needs any key, writing one
that manages.

GET    /v1/jobs /v1/jobs/{id} /v1/jobs/{id}/log
POST   /v1/jobs /v1/jobs/{id}/stop /v1/jobs/{id}/resume
DELETE /v1/jobs/{id}
GET    /v1/catalogue/{data|models} /v1/catalogue/{data|models}/{name}
POST   /v1/catalogue/{data|models}
GET    /v1/models/{name}/lineage
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.hub.catalogue import DATA, MODEL, Catalogue, Lineage, Version
from openm6.hub.jobs import ENGINES, Jobs, describe_job
from openm6.serve.keys import MANAGE, Key
from openm6.serve.server import Server, asker

TAIL = 100_000
"""Maximum number of bytes of a log tail."""
T = TypeVar("T")

Kind = Literal["data", "models"]
KINDS = {"data": DATA, "models": MODEL}


class JobRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    command: list[str] = Field(
        min_length=1, max_length=200, description="of openm6, word by word: finetune, goods@1, ..."
    )
    name: str = Field("", max_length=200)
    engine: Literal[ENGINES] = Field("here", description="a process of this machine, or a Ray cluster")  # type: ignore[valid-type]
    gpus: int = Field(0, ge=0, le=64, description="on Ray")


class VersionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    place: str = Field(min_length=1, description="data: a source; a model: its directory on the server")
    made_of: list[str] = Field(default_factory=list, description="of a model: goods@1, data:items@2")
    metrics: dict[str, float] = Field(default_factory=dict)
    note: str = Field("", max_length=2000)


def add_hub(app: FastAPI, server: Server) -> None:
    """Add the routes. They are plain functions, which FastAPI runs in threads, because they wait for files and
    databases."""
    jobs, catalogue = Jobs(), Catalogue()

    @app.get("/v1/jobs")
    def list_jobs(_: Annotated[Key, asker()]) -> dict[str, Any]:
        """All jobs with their states, the oldest first."""
        return {"object": "list", "data": [describe_job(job) for job in jobs.list()]}

    @app.post("/v1/jobs", status_code=201)
    def submit(asked: JobRequest, _: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """Queue a command of openm6."""
        return describe_job(jobs.submit(asked.command, asked.name, engine=asked.engine, gpus=asked.gpus))

    @app.get("/v1/jobs/{identity}")
    def job(identity: str, _: Annotated[Key, asker()]) -> dict[str, Any]:
        """One job."""
        return describe_job(known(jobs.get, identity))

    @app.get("/v1/jobs/{identity}/log")
    def log(identity: str, _: Annotated[Key, asker()]) -> PlainTextResponse:
        """The log tail of a job."""
        return PlainTextResponse(jobs.last_said(known(jobs.get, identity), TAIL))

    @app.post("/v1/jobs/{identity}/stop")
    def stop(identity: str, _: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """Stop a job; it can be resumed."""
        known(jobs.get, identity)
        return describe_job(jobs.stop(identity))

    @app.post("/v1/jobs/{identity}/resume")
    def resume(identity: str, _: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """Queue a stopped or failed job again."""
        known(jobs.get, identity)
        return describe_job(jobs.resume(identity))

    @app.delete("/v1/jobs/{identity}", status_code=204)
    def remove(identity: str, _: Annotated[Key, asker(MANAGE)]) -> None:
        """Remove a finished job."""
        known(jobs.get, identity)
        jobs.remove(identity)

    @app.get("/v1/catalogue/{kind}")
    def names(kind: Kind, _: Annotated[Key, asker()]) -> dict[str, Any]:
        """All versions of all data sets, or models."""
        return {"object": "list", "data": [_version(one) for one in catalogue.every(KINDS[kind])]}

    @app.get("/v1/catalogue/{kind}/{name}")
    def one(kind: Kind, name: str, _: Annotated[Key, asker()]) -> dict[str, Any]:
        """A version (NAME@3, NAME@live, or the last one of NAME) with its whole lineage."""
        return _lineage(catalogue.lineage(known(lambda text: catalogue.named(text, KINDS[kind]), name)))

    @app.post("/v1/catalogue/{kind}", status_code=201)
    def add(kind: Kind, asked: VersionRequest, _: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """Add a version."""
        if kind == "data":
            return _version(catalogue.add_data(asked.name, asked.place))
        place = Path(asked.place)
        return _version(
            catalogue.add_model(asked.name, place, made_of=asked.made_of, metrics=asked.metrics, note=asked.note)
        )

    @app.get("/v1/models/{name}/lineage")
    def lineage(name: str, _: Annotated[Key, asker()]) -> dict[str, Any]:
        """The lineage of a deployed model, back to its data."""
        place = server.fleet.get(name).place.model
        version = catalogue.version_at(place)
        if version is None:
            message = f"{name} is served from a directory outside of the catalogue."
            raise Refusal(ErrorKind.NOT_FOUND, message, "not_in_catalogue")
        return _lineage(catalogue.lineage(version))


def known(find: Callable[[str], T], name: str) -> T:
    """The job or version of this name. Raises Refusal (NOT_FOUND) where there is none."""
    try:
        return find(name)
    except UsageError as error:
        raise Refusal(ErrorKind.NOT_FOUND, str(error)) from None


def _version(one: Version) -> dict[str, Any]:
    return {
        "name": one.name, "version": one.number, "aliases": list(one.aliases), "created": one.created,
        "made_of": [f"{'data:' if kind == DATA else ''}{name}@{number}" for kind, name, number in one.made_of],
        **one.about,
    }  # fmt: skip


def _lineage(one: Lineage) -> dict[str, Any]:
    return {**_version(one.version), "kind": one.version.kind, "made_of": [_lineage(part) for part in one.made_of]}
