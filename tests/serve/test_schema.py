"""Whatever may be asked by the API's own description: nothing of it breaks the server (schemathesis)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from openm6.core.environment import HOME
from openm6.inference.session import Session
from openm6.serve.server import Options
from openm6.serve.wire import Place
from tests.serve.test_api import Served

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow

EXAMPLES = 12
"""Requests to each operation."""


@pytest.fixture(scope="module")
def served(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("schema")
    session.save(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME, str(folder / "home"))
        patch.chdir(folder)
        one = Served({"m6": Place(folder / "model")}, Options(body_mib=1, seconds=20))
        yield one
        one.stop()


def test_no_request_breaks_the_server(served: Served) -> None:
    """Requests that keep to the description of each operation, and such as do not."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    seen: Counter[int] = Counter()
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def asked(case: Any) -> None:
                answer = case.call(timeout=60)
                seen[answer.status_code] += 1
                told = f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text[:500]}"
                assert answer.status_code < 500 or answer.status_code == 504, told  # 504: longer than it may take
                if answer.status_code >= 400:
                    assert "Traceback" not in answer.text and '"error"' in answer.text, told

            try:
                asked()
            except Unsatisfiable:  # of an operation that takes nothing no request is wrong
                continue
    assert {200, 404, 400} <= set(seen), seen
    assert not any(deployment.restarts for deployment in served.fleet.deployments.values())
