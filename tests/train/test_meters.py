"""What a run costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cpuinfo
import pytest
from codecarbon.core.hardware_cache import clear_cache
from codecarbon.core.util import detect_cpu_model

from openm6.train.meters import EnergyMeter

TOLD = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not TOLD.is_file() or "model name" not in TOLD.read_text("utf-8"), reason="no file tells the processor's name here"
)
def test_the_processors_name_is_read_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    name = cpuinfo.get_cpu_info()["brand_raw"]

    def slow() -> dict[str, Any]:
        raise AssertionError("asked for what a file tells")

    monkeypatch.setattr(cpuinfo, "get_cpu_info", slow)
    detect_cpu_model.cache_clear()
    clear_cache()
    meter = EnergyMeter()
    meter.stop()
    assert meter._tracker._conf["cpu_model"] == name
    assert cpuinfo.get_cpu_info is slow
