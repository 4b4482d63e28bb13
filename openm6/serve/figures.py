"""Metrics for Prometheus, the recent load of each model, for charts, and optional OpenTelemetry traces: a span for each
request, with one inside for the work of the engine, without texts or pictures. The standard variables
(OTEL_EXPORTER_OTLP_ENDPOINT and others) configure the exporter."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from openm6._version import __version__
from openm6.core.extras import require

if TYPE_CHECKING:
    from fastapi import FastAPI

    from openm6.serve.fleet import Fleet
    from openm6.serve.process import Worker

_TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
STATE = 5.0
"""Seconds to wait for the state of a model's process."""
EVERY = 5.0
"""Seconds between two points without a viewer."""
SHORTEST = 1.0
POINTS = 720
"""Number of points kept, of all models together; an hour of a single one."""


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
                if "energy_kwh" in state:
                    energy.add_metric([name], state["energy_kwh"])
                for work, seconds in state["seconds"].items():
                    busy.add_metric([name, work], seconds)
        yield from (waiting, running, restarts, energy, busy)

    async def page(self, fleet: Fleet) -> bytes:
        restarts = {name: one.restarts for name, one in fleet.deployments.items()}
        self._states = {name: (restarts.get(name, 0), state) for name, state in (await _states(fleet)).items()}
        return generate_latest(self.registry)


class History:
    """Points of {"time", "model", "tokens" and "requests" a second, "open", "watts" (None: not measured)}; `now` has
    the last state of each model's process (worker.py), its "time" and "tokens_per_second"."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet
        self.points: deque[dict[str, Any]] = deque(maxlen=POINTS)
        self.now: dict[str, dict[str, Any]] = {}
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
        for name, state in (await _states(self.fleet)).items():
            if not state:
                continue
            before = self.now.get(name)
            if before is None or before["answered"] > state["answered"]:  # the process is new
                before = {**state, "time": now - EVERY}
            passed = now - before["time"]
            tokens, requests = ((state[what] - before[what]) / passed for what in ("tokens", "answered"))
            self.now[name] = {**state, "time": now, "tokens_per_second": tokens}
            self.points.append({
                "time": now, "model": name, "tokens": tokens, "requests": requests,
                "open": state["waiting"] + state["running"], "watts": state.get("watts"),
            })  # fmt: skip


async def _states(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """The state of each model's process; empty where it has ended or does not answer."""

    async def state(worker: Worker | None) -> dict[str, Any]:
        with suppress(TimeoutError):
            return await asyncio.wait_for(worker.state(), STATE) if worker else {}
        return {}

    known = dict(fleet.deployments)
    return dict(zip(known, await asyncio.gather(*(state(one.worker) for one in known.values())), strict=True))


def add_traces(app: FastAPI, exporter: Any = None) -> None:
    """Trace all requests, and the answers of the application's server. `exporter`: replaces OTLP over HTTP. Raises
    UsageError without the packages."""
    require("traces", "opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "openm6", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="healthz,readyz,metrics,gradio_api")
    app.state.server.tracer = provider.get_tracer("openm6", __version__)
    app.state.server.at_end.append(provider.shutdown)  # it sends the last spans


def end_span(span: Any, status: str, tokens: int) -> None:
    """End the span of an answer, whose last attributes are its status and tokens."""
    from opentelemetry.trace import StatusCode

    span.set_attributes({"openm6.status": status, "openm6.tokens": tokens})
    if status not in ("ok", "cancelled"):
        span.set_status(StatusCode.ERROR, status)
    span.end()
