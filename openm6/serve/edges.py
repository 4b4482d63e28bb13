"""Reports of edge devices: counts and averages by task, without inputs and answers.

POST /v1/edges/{name}    a device's newest counts (sent by openm6-edge)
GET  /v1/edges           the reports of all devices, with a key that manages
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from openm6.core.errors import UsageError
from openm6.serve.keys import MANAGE, Key
from openm6.serve.server import Server, asker

MOST = 10_000
"""Maximum number of devices that are remembered; those with the oldest reports are dropped."""

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]


class Statistics(BaseModel):
    """A report: numbers alone, with no field for a text or a picture."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
    seconds: float = Field(ge=0, description="covered by the counts")
    tasks: dict[Word, dict[Word, Number]] = Field(max_length=256)


def add_edges(app: FastAPI, server: Server) -> None:
    known: OrderedDict[str, dict[str, Any]] = OrderedDict()

    @app.post("/v1/edges/{name}")
    async def tell(name: str, told: Statistics, key: Annotated[Key, asker()]) -> dict[str, Any]:
        """Report the counts of an edge device, in place of its previous report."""
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or len(name) > 64:
            raise UsageError(
                "The name of an edge device has at most 64 characters: letters, digits, - _ and .", param="name"
            )
        known[name] = {"name": name, "key": key.name, "heard": round(time.time()), **told.model_dump()}
        known.move_to_end(name)
        while len(known) > MOST:
            known.popitem(last=False)
        return {"object": "edge", "name": name}

    @app.get("/v1/edges")
    async def edges(_: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """The edge devices that have reported since this server started."""
        return {"object": "list", "data": list(known.values())}
