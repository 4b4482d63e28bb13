"""Figures for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from openm6.serve.fleet import Fleet

_TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Figures:
    """Of one server; `kind` is text, picture, vector or value."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("openm6_requests", "Requests by how they ended", ["kind", "status"], registry=registry)
        self.seconds = Histogram(
            "openm6_request_seconds", "Whole requests", ["kind"], buckets=_TIMES, registry=registry
        )
        self.first = Histogram(
            "openm6_first_seconds", "Until the first piece or the answer", ["kind"], buckets=_TIMES, registry=registry
        )
        self.tokens = Counter("openm6_tokens", "Tokens and codes written", ["kind"], registry=registry)
        self.waiting = Gauge("openm6_waiting", "Requests that wait", ["model"], registry=registry)
        self.running = Gauge("openm6_running", "Requests that are worked at", ["model"], registry=registry)
        self.restarts = Gauge("openm6_restarts", "Times that a model's process died", ["model"], registry=registry)
        self.energy = Gauge(
            "openm6_energy_kwh",
            "Of a model's process, mostly estimated from nominal power",
            ["model"],
            registry=registry,
        )
        self.busy = Gauge("openm6_busy_seconds", "Time spent by the engine", ["model", "work"], registry=registry)

    async def page(self, fleet: Fleet) -> bytes:
        for name, deployment in fleet.deployments.items():
            self.restarts.labels(name).set(deployment.restarts)
            state = await deployment.worker.state() if deployment.worker else {}
            if state:
                self.waiting.labels(name).set(state["waiting"])
                self.running.labels(name).set(state["running"])
                self.energy.labels(name).set(state["energy_kwh"])
                for work, seconds in state["seconds"].items():
                    self.busy.labels(name, work).set(seconds)
        return generate_latest(self.registry)
