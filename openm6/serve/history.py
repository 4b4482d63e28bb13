"""The recent load of each model, for charts."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm6.serve.fleet import Fleet

EVERY = 5.0
"""Seconds between two points without a viewer."""
SHORTEST = 1.0
POINTS = 720
"""Number of points kept, of all models together; an hour of a single one."""


class History:
    """Points of {"time", "model", "tokens" and "requests" a second, "open", "watts"}; `now` has the last state of each
    model: "waiting", "running", "answered", "tokens" a second, "wh" since its process began."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet
        self.points: deque[dict[str, Any]] = deque(maxlen=POINTS)
        self.now: dict[str, dict[str, Any]] = {}
        self._before: dict[str, dict[str, Any]] = {}
        self._sampled = 0.0

    async def follow(self) -> None:
        """Sample again and again, until the task is cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(EVERY)

    async def sample(self) -> None:
        """Add a point of each model, unless the last one is less than a second old."""
        now = time.time()
        if now - self._sampled < SHORTEST:
            return
        self._sampled = now
        for name, deployment in list(self.fleet.deployments.items()):
            state = await deployment.worker.state() if deployment.worker else {}
            if not state:
                continue
            before = self._before.get(name)
            if before is None or before["answered"] > state["answered"]:  # the process is new
                before = {**state, "time": now - EVERY}
            passed = now - before["time"]
            rate = {
                "tokens": (state["tokens"] - before["tokens"]) / passed,
                "requests": (state["answered"] - before["answered"]) / passed,
                "watts": state["watts"],
            }
            self._before[name] = {**state, "time": now}
            self.now[name] = {
                "waiting": state["waiting"], "running": state["running"], "answered": state["answered"],
                "tokens": rate["tokens"], "wh": 1000 * state["energy_kwh"],
            }  # fmt: skip
            self.points.append({"time": now, "model": name, "open": state["waiting"] + state["running"], **rate})
