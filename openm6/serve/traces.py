"""Optional OpenTelemetry traces: a span for each request, with one inside for the work of the engine.

The standard variables (OTEL_EXPORTER_OTLP_ENDPOINT and others) configure the exporter. Spans hold no texts and
pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openm6._version import __version__
from openm6.core.extras import require

if TYPE_CHECKING:
    from fastapi import FastAPI


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
