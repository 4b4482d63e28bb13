"""Metrics for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from openm6.serve.fleet import Deployment, Fleet

_TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
STATE = 5.0
"""Seconds to wait for the state of a model's process."""


class Figures:
    """The metrics of a server. `model` is the name of a deployment, `kind` is text, picture, vector or value."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ["model", "kind"]
        self.requests = Counter("openm6_requests", "Requests by how they ended", [*labels, "status"], registry=registry)
        self.seconds = Histogram("openm6_request_seconds", "Whole requests", labels, buckets=_TIMES, registry=registry)
        self.first = Histogram(
            "openm6_first_seconds", "Until the first piece or the answer", labels, buckets=_TIMES, registry=registry
        )
        self.tokens = Counter("openm6_tokens", "Tokens and codes written", labels, registry=registry)
        self.prompt_tokens = Counter("openm6_prompt_tokens", "Tokens of prompts", labels, registry=registry)
        self._answers = Counter("openm6_http_responses", "Answers by HTTP status", ["status"], registry=registry)
        self._states: dict[str, tuple[int, dict[str, Any]]] = {}
        registry.register(self)

    def answered(self, status: int) -> None:
        """Count a response by its HTTP status."""
        self._answers.labels(str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """The last states of the models' processes, for prometheus_client. Counters of a process restart at 0 with
        it."""
        waiting = GaugeMetricFamily("openm6_waiting", "Requests that wait", labels=["model"])
        running = GaugeMetricFamily("openm6_running", "Requests that are worked at", labels=["model"])
        restarts = CounterMetricFamily("openm6_restarts", "Times that a model's process died", labels=["model"])
        energy = CounterMetricFamily(
            "openm6_energy_kwh", "Of a model's process, mostly estimated from nominal power", labels=["model"]
        )
        busy = CounterMetricFamily("openm6_busy_seconds", "Time spent by the engine", labels=["model", "work"])
        for name, (times, state) in self._states.items():
            restarts.add_metric([name], times)
            if state:
                waiting.add_metric([name], state["waiting"])
                running.add_metric([name], state["running"])
                energy.add_metric([name], state["energy_kwh"])
                for work, seconds in state["seconds"].items():
                    busy.add_metric([name, work], seconds)
        yield from (waiting, running, restarts, energy, busy)

    async def page(self, fleet: Fleet) -> bytes:
        known = dict(fleet.deployments)
        states = await asyncio.gather(*map(_state, known.values()))
        self._states = {name: (known[name].restarts, state) for name, state in zip(known, states, strict=True)}
        return generate_latest(self.registry)


async def _state(deployment: Deployment) -> dict[str, Any]:
    """The state of a model's process; empty where it has ended or does not answer."""
    try:
        return await asyncio.wait_for(deployment.worker.state(), STATE) if deployment.worker else {}
    except TimeoutError:
        return {}
