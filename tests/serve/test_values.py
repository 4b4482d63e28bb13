"""JSON of very many values, and the texts that only look like it."""

from __future__ import annotations

import json

import pytest

from openm6.serve.bodies import VALUES
from tests.serve.test_http import Site, error_in, site

__all__ = ["site"]


@pytest.mark.parametrize("part", ["{}", "[]", "1", '"a"', '{"a":1}', "[[[[[[]]]]]]"])
@pytest.mark.parametrize("many", [True, False])
def test_json_of_more_values_than_any_request_has_is_not_read(site: Site, part: str, many: bool) -> None:
    """Reading millions of values would hold up all others; as many marks within a text are none."""
    content = f"[{','.join([part] * (VALUES + 1))}]"
    body = f'{{"text": "a", "parts": {content}}}' if many else json.dumps({"text": content})
    answer = site.http.post("/v1/tasks/echo", content=body, headers={"content-type": "application/json"})
    if many:
        assert error_in(answer, 413)["code"] == "too_large" and "65,536 values" in answer.text
    else:
        assert answer.json() == {"length": len(content)}


def test_a_text_without_an_end_is_looked_through_once(site: Site) -> None:
    """From each of its quotes it would take minutes."""
    body = '{"text": "' + '\\",' * 300_000
    answer = site.http.post("/v1/tasks/echo", content=body, headers={"content-type": "application/json"})
    assert error_in(answer, 400)["code"] == "invalid_json"
