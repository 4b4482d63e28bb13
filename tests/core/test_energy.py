"""What a run costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cpuinfo
import pytest
from codecarbon.core import cpu
from codecarbon.core.hardware_cache import clear_cache
from codecarbon.core.util import detect_cpu_model

from openm6.core.energy import EnergyMeter

TOLD = Path("/proc/cpuinfo")


@pytest.mark.slow
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


@pytest.mark.parametrize("readable", [True, False])
def test_counters_that_may_not_be_read_measure_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    domain = tmp_path / "intel-rapl" / "intel-rapl:0"
    domain.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "262143328850")):
        (domain / name).write_text(text + "\n", "utf-8")
    access, exists, there = os.access, Path.exists, os.path.exists
    monkeypatch.setattr(cpu, "_get_candidate_bases", lambda folder: [str(tmp_path)])
    monkeypatch.setattr(os, "access", lambda path, mode: readable if "energy_uj" in str(path) else access(path, mode))
    monkeypatch.setattr(Path, "exists", lambda path: "powercap" in str(path) or exists(path))
    monkeypatch.setattr(os.path, "exists", lambda path: "powercap" in str(path) or there(path))
    clear_cache()
    meter = EnergyMeter()
    (domain / "energy_uj").write_text("3601000000\n", "utf-8")  # 1 Wh more
    meter._tracker._measure_power_and_energy()
    use = meter.stop()
    clear_cache()
    assert use.kwh > 0
    assert (use.measured > 0.5) == readable and (use.measured > 0) == readable
