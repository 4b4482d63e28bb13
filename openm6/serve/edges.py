"""What boxes on the edge tell of themselves: counts and averages by task, nothing of what they were asked.

POST /v1/edges/{name}    a box's newest counts (openm6-edge, on its own)
GET  /v1/edges           of all boxes, with a key that manages
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
"""Boxes that are remembered, those heard of the latest."""

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]


class Statistics(BaseModel):
    """Numbers alone: there is no place in it for a text or a picture."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
    seconds: float = Field(ge=0, description="for which the counts were made")
    tasks: dict[Word, dict[Word, Number]] = Field(max_length=256)


def add_edges(app: FastAPI, server: Server) -> None:
    known: OrderedDict[str, dict[str, Any]] = OrderedDict()

    @app.post("/v1/edges/{name}")
    async def tell(name: str, told: Statistics, key: Annotated[Key, asker()]) -> dict[str, Any]:
        """What a box tells of itself; the newest counts take the place of those before."""
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
        """The boxes that were heard of since this server started."""
        return {"object": "list", "data": list(known.values())}
