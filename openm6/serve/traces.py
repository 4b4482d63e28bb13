"""Optional OpenTelemetry traces: a span for each request, with one inside for the work of the engine.

The standard variables (OTEL_EXPORTER_OTLP_ENDPOINT and others) configure the exporter. Spans hold no texts and
pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from openm6._version import __version__
from openm6.core.extras import require

if TYPE_CHECKING:
    from fastapi import FastAPI


class NoSpan:
    """A span that records nothing."""

    def __init__(self, model: str = "", task: str = ""):
        pass

    def first(self) -> None:
        """Record the first piece, or the answer."""

    def end(self, status: str, tokens: int) -> None:
        """End the span."""


def add_traces(app: FastAPI, exporter: Any = None) -> tuple[type[NoSpan], Callable[[], None]]:
    """Trace all requests. Returns the class of spans for answers, and a function that flushes the last ones.

    `exporter`: replaces OTLP over HTTP. Raises UsageError without the packages."""
    require("traces", "opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import StatusCode

    provider = TracerProvider(resource=Resource.create({"service.name": "openm6", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="healthz,readyz,metrics,gradio_api")
    tracer = provider.get_tracer("openm6", __version__)

    class Traced(NoSpan):
        def __init__(self, model: str, task: str):
            self._span = tracer.start_span("answer", attributes={"openm6.model": model, "openm6.task": task})

        def first(self) -> None:
            self._span.add_event("first")

        def end(self, status: str, tokens: int) -> None:
            self._span.set_attributes({"openm6.status": status, "openm6.tokens": tokens})
            if status not in ("ok", "cancelled"):
                self._span.set_status(StatusCode.ERROR, status)
            self._span.end()

    return Traced, provider.shutdown
