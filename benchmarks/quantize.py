"""Products with weights in 8 and 4 bits on this machine's CPU: ours, torchao's (eager, and under torch.compile), and
none rounded; all the products of a `small` network's feed-forwards, one after the other, for a few rows at a time.

    pip install -e '.[lowbit]'        # or beside the rest, in .venv/lowbit, as `make` does
    python -m benchmarks quantize
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import race
from openm6.model import lowbit
from openm6.model.cpu.packed import packed

TITLE = "Products in 8 and 4 bits on a CPU"
HIDDEN, WIDTH, LAYERS = 512, 1408, 12
ROWS = (1, 16, 128)


class Products(nn.Module):
    """[R, HIDDEN] to [R, HIDDEN]: gate and up, down, LAYERS times."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 2 * WIDTH, bias=False) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            gate, value = up(x).chunk(2, dim=-1)
            x = x + down((F.silu(gate) * value).to(x.dtype)).to(x.dtype)
        return x


def run() -> tuple[list[dict[str, Any]], str]:
    sys.path.insert(0, str(Path(".venv/lowbit").resolve()))
    try:
        import torchao
    except ImportError:
        sys.exit("torchao is not there: pip install -e '.[lowbit]'.")
    # Some of its warnings are of GPUs that are not there.
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    whole = Products().eval()
    rows = []
    with torch.inference_mode():
        sides = _sides(whole)
        for count in ROWS:
            x = torch.randn(count, HIDDEN)
            wanted = whole(x)
            errors = {name: float((side(x) - wanted).norm() / wanted.norm()) for name, side in sides.items()}
            timings = race({name: lambda side=side, x=x: side(x) for name, side in sides.items()}, repeats=31)  # type: ignore[misc]
            base = timings["fp32"].median
            rows += [
                {"rows": count, "side": name, "ms": round(1e3 * t.median, 3),
                 "spread": f"{1e3 * t.low:.3f} to {1e3 * t.high:.3f}", "times fp32": round(base / t.median, 2),
                 "error %": round(100 * errors[name], 2)}
                for name, t in timings.items()
            ]  # fmt: skip
    note = (
        f"{LAYERS} feed-forwards of {HIDDEN} to {WIDTH}, {torch.get_num_threads()} threads, torchao "
        f"{torchao.__version__}; median of 31 runs in turn, spread = quartiles. `times fp32`: how many times as fast. "
        "`error`: of the output, in the Euclidean norm, against fp32."
    )
    return rows, note


def _sides(whole: Products) -> dict[str, Callable[[Tensor], Tensor]]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    weight_only, dynamic = Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()
    return {
        "fp32": whole,
        "fp32, compiled": _compiled(_copy(whole)),
        "OpenM6, fp32": _packed(whole, torch.float32),
        "OpenM6, bf16": _packed(whole, torch.bfloat16),
        "OpenM6, 8 bits": _packed(whole, lowbit.INT8),
        "OpenM6, 4 bits": _packed(whole, lowbit.INT4),
        "torchao, 8 bits, weights": _theirs(whole, weight_only),
        "torchao, 8 bits, weights, compiled": _compiled(_theirs(whole, weight_only)),
        "torchao, 8 bits, dynamic": _theirs(whole, dynamic),
        "torchao, 8 bits, dynamic, compiled": _compiled(_theirs(whole, dynamic)),
    }


def _copy(whole: Products) -> Products:
    other = Products().eval()
    other.load_state_dict(whole.state_dict())
    return other


def _packed(whole: Products, dtype: torch.dtype) -> Products:
    other = _copy(whole)
    for side in (other.up, other.down):
        for number, linear in enumerate(side):
            assert isinstance(linear, nn.Linear)
            side[number] = packed(linear.weight, None, dtype)
    return other


def _theirs(whole: Products, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    other = _copy(whole)
    quantize_(other, config)
    return other


def _compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = torch.compile(module)
    return found
