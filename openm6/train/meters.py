"""What a run costs: speed against the machine's own peak, and energy."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cache

import torch

from openm6.model import ModelConfig


@cache
def peak_flops(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matrix product here, the best of a few: what achieved speed is held against."""
    size = size or (8192 if device == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        c = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del c
    return 2 * size**3 / best


def training_flops(config: ModelConfig, positions: int, pairs: int, trained: int) -> float:
    """FLOPs of a forward and backward pass: 6 for every weight and position that meet, attention and head apart.
    Of the experts those count that a token sees.

    positions: real ones (no padding). pairs: query-key pairs that the mask allows. trained: positions with a
    label (the only ones that reach the head). The image embedder is left out, so the figure is a little low.
    """
    parts = config.count_parameters()
    seen = parts["experts"] * config.experts_per_token / max(1, config.num_experts)
    weights = parts["attention"] + parts["feed_forward"] + parts["shared_experts"] + parts["router"] + seen
    weights *= config.num_hidden_layers / (config.distinct_layers or config.num_hidden_layers)  # shared, but run again
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return 6.0 * weights * positions + attention + 6.0 * config.vocab_size * config.hidden_size * trained


@dataclass(frozen=True, slots=True)
class EnergyUse:
    """kWh and kg CO2e since the start, and how they were known."""

    kwh: float
    co2e_kg: float
    measured: bool


class EnergyMeter:
    """codecarbon, offline. Without power counters (RAPL, NVML) its figures are estimates, and marked so."""

    def __init__(self, country: str = "CHN"):
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").disabled = True
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            tracking_mode="process",
            measure_power_secs=15,
            save_to_file=False,
            log_level="critical",
            allow_multiple_runs=True,
        )
        self._tracker.start()

    def read(self) -> EnergyUse:
        co2e = self._tracker.flush() or 0.0
        return EnergyUse(float(self._tracker._total_energy.kWh), float(co2e), self._measured())

    def stop(self) -> EnergyUse:
        co2e = self._tracker.stop() or 0.0
        return EnergyUse(float(self._tracker.final_emissions_data.energy_consumed), float(co2e), self._measured())

    def _measured(self) -> bool:
        from pathlib import Path

        return torch.cuda.is_available() or Path("/sys/class/powercap/intel-rapl").exists()
