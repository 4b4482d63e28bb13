"""Energy of a process, by counters or by estimate, carbon intensity of a country's electricity, and peak memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from openm6.core.environment import peak_resident
from openm6.core.errors import UsageError
from openm6.core.extras import is_installed, require

COUNTERS = ("intel_rapl", "intel_power_gadget", "windows_emi")
"""Modes in which codecarbon reads hardware counters of a processor; the other modes estimate from nominal power and
load."""


@dataclass(frozen=True, slots=True)
class EnergyUse:
    """Energy (kWh) and emissions (kg CO2e) since the start. `measured` is the fraction of the energy from hardware
    counters; the rest is estimated from the nominal power of the processors."""

    kwh: float = 0.0
    co2e_kg: float = 0.0
    measured: float = 0.0

    def __add__(self, other: EnergyUse) -> EnergyUse:
        kwh = self.kwh + other.kwh
        measured = self.kwh * self.measured + other.kwh * other.measured
        return EnergyUse(kwh, self.co2e_kg + other.co2e_kg, measured / kwh if kwh else 0.0)


class EnergyMeter:
    """Energy measured by codecarbon, offline, with its table of carbon intensities (`country`: ISO code of three
    letters).

    Processors are measured where codecarbon can read their counters (RAPL, which may be present and readable by root
    only), GPUs by NVML; memory is always estimated. `before`: use of earlier parts of the run, None where one of them
    was not measured. Without codecarbon (extra monitor) nothing is measured, and `read` and `stop` return None."""

    def __init__(self, country: str = "CHN"):
        self.before: EnergyUse | None = EnergyUse()
        self._tracker: Any = None
        if not is_installed("codecarbon"):
            return
        from codecarbon import OfflineEmissionsTracker

        carbon_intensity(country)  # codecarbon only warns of an unknown country
        logging.getLogger("codecarbon").disabled = True
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            tracking_mode="process",
            measure_power_secs=15,
            save_to_file=False,
            log_level="critical",
            allow_multiple_runs=True,
        )
        with _processor_known():
            self._tracker.start()

    def read(self) -> EnergyUse | None:
        """Energy since the start of the run."""
        return self._use(self._tracker.flush()) if self._tracker else None

    def stop(self) -> EnergyUse | None:
        """Energy since the start of the run; ends the measurement."""
        return self._use(self._tracker.stop()) if self._tracker else None

    def _use(self, co2e_kg: float | None) -> EnergyUse | None:
        if self.before is None:
            return None
        tracker = self._tracker
        kwh = float(tracker._total_energy.kWh)
        counted = 0.0
        if torch.cuda.is_available():
            counted += float(tracker._total_gpu_energy.kWh)
        if any(getattr(part, "_mode", None) in COUNTERS for part in tracker._hardware):
            counted += float(tracker._total_cpu_energy.kWh)
        return self.before + EnergyUse(kwh, co2e_kg or 0.0, counted / kwh if kwh else 0.0)


@contextmanager
def _processor_known() -> Iterator[None]:
    """Give codecarbon the processor's name from /proc/cpuinfo: py-cpuinfo, which it asks, takes one or two seconds."""
    import cpuinfo

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if not names:
        yield
        return
    asked = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = lambda: {"brand_raw": names[0]}
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = asked


def carbon_intensity(country: str) -> float:
    """Carbon intensity of a country (ISO code of three letters), by codecarbon's table, in kg CO2e per kWh."""
    require("monitor", "codecarbon")
    table = json.loads(
        resources.files("codecarbon").joinpath("data/private_infra/global_energy_mix.json").read_text("utf-8")
    )
    if country not in table:
        raise UsageError(f'There is no country "{country}"; give an ISO code of three letters, such as CHN or DEU.')
    return float(table[country]["carbon_intensity"]) / 1000


def peak_memory() -> int:
    """Peak memory of this process in bytes since the last call: of the GPU's allocator, else resident (since the start
    of the process where the system cannot reset the peak)."""
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most
    return peak_resident()
