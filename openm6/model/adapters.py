"""Adapters: a network whose own weights stay, and small ones beside them that are trained (PEFT underneath).

    adapter_config.json, adapter_model.safetensors     as PEFT writes and reads them

LoRA (Hu et al. 2021, arXiv 2106.09685) adds B A x alpha / rank to the product of a linear layer, A [rank, in] and
B [out, rank]. B starts at zero, so that an adapted network starts as the one beneath.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from openm6.errors import OpenM6Error, UsageError

if TYPE_CHECKING:
    from openm6.model.m6 import M6

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LINEAR = ("qkv", "out", "up", "down")
"""Names of the linear layers of a block."""

_BASE, _NEW, _NAME = ".base_layer.", ".lora_", ".default."
_PREFIX = "base_model.model."
"""What PEFT puts before a network's names in its files."""


def lora_config(base: Path, rank: int, alpha: int) -> Any:
    """PEFT's configuration of a LoRA on the model directory `base`."""
    from peft import LoraConfig

    pattern = rf"blocks\..*\.({'|'.join(LINEAR)})"
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, base_model_name_or_path=str(base))


def add_adapter(model: M6, config: Any) -> None:
    """Put an adapter into a network in place. Only its own weights are trained; they are still to be filled."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_NEW in name)


def base_name(name: str) -> str | None:
    """The name that a tensor of an adapted network has in the network beneath; None for the adapter's own."""
    return None if _NEW in name else name.replace(_BASE, ".")


def adapter_start(name: str, parameter: Tensor) -> float:
    """The deviation that a weight of an adapter starts with: PEFT's rule, as a normal distribution; 0 for zeros."""
    return 1 / math.sqrt(3 * parameter.shape[1]) if ".lora_A." in name else 0.0


def stored_name(name: str) -> str:
    """The name in PEFT's file of a weight of an adapter."""
    return _PREFIX + name.replace(_NAME, ".")


def base_of(path: Path) -> Path | None:
    """The model directory beneath the adapter in `path`; None where `path` holds no adapter."""
    if not (path / CONFIG).is_file():
        return None
    try:
        base = Path(json.loads((path / CONFIG).read_text("utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        raise OpenM6Error(f"{path / CONFIG} is damaged.") from None
    if not (base / "config.json").is_file():
        raise UsageError(
            f"{path} is an adapter of the model {base}, which is not there. Bring it back, or write where it is now "
            f"into {path / CONFIG} (base_model_name_or_path)."
        )
    return base


def merge_adapter(model: M6, path: Path) -> M6:
    """The network with an adapter's change in its own weights."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (path / WEIGHTS).is_file():
        raise OpenM6Error(f"{path} has no {WEIGHTS} (pickled adapters are not read).")
    try:
        merged: M6 = PeftModel.from_pretrained(model, path, local_files_only=True).merge_and_unload()  # type: ignore[arg-type]
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenM6Error(f"The adapter {path} does not fit the model beneath it, or is damaged: {reason}") from None
    return merged
