"""A cluster that cannot be used is one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from openm6.core.errors import OpenM6Error
from openm6.core.ray_cluster import connect


def test_a_cluster_that_cannot_be_reached_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect to GCS.\nPlease check the address.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(OpenM6Error, match=r"at 10.0.0.1:6379 cannot be used: Failed to connect to GCS.$"):
        connect("10.0.0.1:6379", log_to_driver=False)
