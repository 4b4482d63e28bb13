"""What OpenTelemetry is told of a request."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from openm6.inference.session import Session
from openm6.serve.api import create_app
from openm6.serve.figures import add_traces
from openm6.serve.fleet import Fleet
from openm6.serve.wire import Place

pytest.importorskip("opentelemetry.instrumentation.fastapi")


@pytest.mark.slow
def test_a_request_is_a_span_without_its_contents(session: Session, tmp_path: Path) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    session.save(tmp_path / "model")
    app, kept = create_app(Fleet(), places={"goods": Place(tmp_path / "model")}), InMemorySpanExporter()
    add_traces(app, kept)
    with TestClient(app) as client:
        assert client.post("/v1/tasks/write", json={"inputs": {"text": "红色的秘密"}}).status_code == 200
        assert client.post("/v1/tasks/write", json={"inputs": {}}).status_code == 400
        assert client.get("/healthz").status_code == 200
    answers = [span for span in kept.get_finished_spans() if span.name == "answer"]
    whole = [span for span in kept.get_finished_spans() if span.kind.name == "SERVER"]
    assert [span.attributes["openm6.status"] for span in answers] == ["ok", "invalid"]
    assert answers[0].attributes["openm6.task"] == "write" and answers[0].attributes["openm6.tokens"] > 0
    assert len(whole) == 2 and answers[0].parent.span_id == whole[0].context.span_id
    assert "秘密" not in "".join(span.to_json() for span in kept.get_finished_spans())
