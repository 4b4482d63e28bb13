"""Adapters: small trained weights beside the frozen weights of a base network.

    adapter_config.json, adapter_model.safetensors     LoRA and IA3 as PEFT writes and reads them

    lora         B A x beside the product of a linear layer (of the experts' weights too, where asked for); B starts at
                 zero, so that an adapted network starts as its base; whole rows of the embedding and the output
                 matrix for tokens that the base has not seen
    ia3          products times learned vectors that start at one
    bottleneck   narrow networks behind what writes into the stream; they start at zero
    prompt       vectors of their own for some positions before every example; prefix: before each layer
    head         the last norm and the output matrix

LoRA and IA3 are PEFT's; they and a head can be merged, the others stay beside (model/changed.py).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from openm6.core.bases import CONFIG, read_adapter_config
from openm6.core.errors import OpenM6Error, UsageError
from openm6.model.changed import ONLY, Active, Bottleneck, Changed, ChangedRows, Low, Prompt, Rows, Scaled
from openm6.model.roles import Role

if TYPE_CHECKING:
    from openm6.model.m6 import M6

C = TypeVar("C", Changed, ChangedRows)

WEIGHTS = "adapter_model.safetensors"

METHODS = ("lora", "ia3", "bottleneck", "prompt", "prefix", "head")
_PEFT = ("lora", "ia3")
MERGEABLE = (*_PEFT, "head")

LINEAR = ("qkv", "out", "up", "down")
"""Names of the linear layers of a block."""

_BASE = ".base_layer"
ROWS = ".token_adapter"
_NEW = re.compile(r"\.lora_|\.ia3_l|\.changes\.|^prompt\.|\.trainable_tokens_")
_KIND = re.compile(r"\.(?=lora_|ia3_l|changes\.|token_adapter\.)")
ALONE = (
    "use_dora", "modules_to_save", "target_parameters", "bias", "lora_bias", "use_qalora",
    "alora_invocation_tokens", "layer_replication", "arrow_config", "use_bdlora", "kasa_config",
)  # fmt: skip
"""Keys of PEFT's configuration that change a network by more than B A beside linear layers."""
_HEAD = ("norm.weight", "norm.bias", "head.weight")
PREFIX = "base_model.model."
"""Prefix of a network's names in PEFT's files."""


@dataclass(frozen=True)
class OwnConfig:
    """The configuration of an adapter that PEFT does not have."""

    method: str
    base_model_name_or_path: str
    rank: int = 0
    length: int = 0

    def save_pretrained(self, path: Path) -> None:
        text = json.dumps({"peft_type": "OPENM6", **asdict(self)}, indent=1)
        (path / CONFIG).write_text(text + "\n", "utf-8")


def adapter_config(
    base: Path, method: str, rank: int = 8, alpha: int = 16, experts: bool = False, length: int = 16,
    rows: dict[str, list[int]] | None = None,
) -> Any:  # fmt: skip
    """The configuration of an adapter of the model directory `base`: PEFT's, or ours. `rank` is also the width of a
    bottleneck, `length` the positions of a prompt; `rows`: with LoRA, ids whose rows of a matrix (embed, head) are
    trained."""
    if method == "lora":
        from peft import LoraConfig

        pattern = rf"blocks\..*\.({'|'.join(LINEAR)})"
        targets = ["experts.up", "experts.down"] if experts else None
        return LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=pattern, target_parameters=targets, trainable_token_indices=rows,
            base_model_name_or_path=str(base),
        )  # fmt: skip
    if method == "ia3":
        from peft import IA3Config

        return IA3Config(
            target_modules=r"blocks\..*\.(qkv|down)", feedforward_modules=r"blocks\..*\.down",
            base_model_name_or_path=str(base),
        )  # fmt: skip
    prompts = method in ("prompt", "prefix")
    return OwnConfig(method, str(base), rank if method == "bottleneck" else 0, length if prompts else 0)


def prompt_length(config: Any) -> int:
    """Number of positions that an adapter adds before every example."""
    return config.length if isinstance(config, OwnConfig) else 0


def add_adapter(model: M6, config: Any) -> None:
    """Add an adapter to a network in place. Its weights alone are trainable, and still to be filled."""
    if not isinstance(config, OwnConfig):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, model)
    elif config.method == "bottleneck":
        active = Active()
        for module in list(model.blocks.modules()):
            for name, layer in list(module.named_children()):
                if getattr(layer, "writes_to_stream", False):
                    changed = Changed(layer, active)
                    changed.changes[ONLY] = Bottleneck(layer.out_features, config.rank)  # type: ignore[arg-type]
                    setattr(module, name, changed)
    elif config.method == "head":
        if model.head is None:  # tied so far
            model.head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
            model.config.tie_word_embeddings = False
    else:
        layers = model.config.num_hidden_layers if config.method == "prefix" else 1
        model.prompt = Prompt(layers, config.length, model.config.hidden_size)
    head = isinstance(config, OwnConfig) and config.method == "head"
    model.adapted = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in _HEAD if head else _NEW.search(name) is not None)


def base_name(name: str) -> str | None:
    """The name of a tensor of an adapted network in its base; None for the adapter's own tensors."""
    return None if _NEW.search(name) else name.replace(_BASE, "").replace(ROWS, "")


def rows_beneath(model: M6, name: str) -> tuple[str, list[int]] | None:
    """For a tensor of an adapter that starts as rows of a matrix of the base network: the matrix's name, and the
    rows."""
    matrix, found, _ = name.partition(ROWS)
    if not found or _NEW.search(name) is None:
        return None
    layer: Any = model.get_submodule(matrix + ROWS)
    return f"{matrix}.weight", layer.token_indices[ONLY]


def adapter_start(role: Role, shape: torch.Size, std: float) -> tuple[float, float]:
    """Mean and standard deviation of an adapter's weight at the start: PEFT's rules, as normal distributions; the
    vectors of a prompt have `std`, as token embeddings do."""
    if role is Role.ADAPTER_INPUT and len(shape) > 1:
        return 0.0, 1 / math.sqrt(3 * shape[1])
    if role is Role.SCALE:
        return 1.0, 0.0
    return 0.0, std if role is Role.EMBEDDING else 0.0


def stored_name(name: str) -> str:
    """The name in PEFT's file of a weight of an adapter."""
    return PREFIX + name.replace(".default.", ".").removesuffix(".default")


def method_of(path: Path) -> str:
    """The method of the adapter in `path`."""
    content = read_adapter_config(path)
    kind = str(content.get("peft_type", "")).lower()
    method = str(content.get("method", "")) if kind == "openm6" else kind
    if method not in METHODS:
        raise OpenM6Error(f"{path} holds an adapter of the kind {method or kind}; known are {', '.join(METHODS)}.")
    return method


def check_whole(path: Path) -> None:
    """Raise UsageError for the directory of an adapter, where a whole model is needed."""
    if (path / CONFIG).is_file():
        raise UsageError(f"{path} is an adapter: make it a model first, with `openm6 models merge`.")


def check_mergeable(path: Path) -> None:
    """Raise UsageError for the directory of an adapter that cannot be merged; a model's is fine."""
    if (path / CONFIG).is_file() and (method := method_of(path)) not in MERGEABLE:
        raise UsageError(
            f"{path} is an adapter of the method {method}, which stays beside its model: use it as it is. "
            f"Merged are: {', '.join(MERGEABLE)}."
        )


def merge_adapter(model: M6, path: Path) -> M6:
    """The network with an adapter merged into its weights, or beside them where the method cannot be merged."""
    weights = stored_weights(path)
    if method_of(path) not in _PEFT:
        content = read_adapter_config(path)
        config = OwnConfig(*(content[key] for key in ("method", "base_model_name_or_path", "rank", "length")))
        add_adapter(model, config)
        names = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if {stored_name(n): p.shape for n, p in names.items()} != {key: value.shape for key, value in weights.items()}:
            raise _misfit(path, "its tensors have other names or shapes")
        for name, parameter in names.items():
            parameter.data = weights[stored_name(name)]
        return model
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings(action="ignore"):  # of tensors that are missing, which is an error below
            adapted = PeftModel.from_pretrained(model, path, local_files_only=True)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(path, error) from None
    if others := weights.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys():
        name = min(others)
        raise _misfit(path, f"{name} is {'unexpected' if name in weights else 'missing'}")
    merged: M6 = adapted.merge_and_unload()  # type: ignore[operator]
    return merged


def stored_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (path / WEIGHTS).is_file():
        raise OpenM6Error(f"{path} has no {WEIGHTS} (pickled adapters are not read).")
    try:
        return load_file(path / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise _misfit(path, error) from None


def _misfit(path: Path, reason: object) -> OpenM6Error:
    text = " ".join(str(reason).split())[:200]
    return OpenM6Error(f"The adapter {path} does not fit its base model, or is damaged: {text}")


def lay_beside(model: M6, adapters: dict[str, Path]) -> Active:
    """Add several adapters to a network, none merged, before it is packed. The returned Active selects one of them; at
    first none is active.

    LoRA, IA3 and bottlenecks of linear layers; raises UsageError for others.
    """
    active = Active(None)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, path in adapters.items():
        method, content = method_of(path), read_adapter_config(path)
        if method in ("prompt", "prefix", "head"):
            raise UsageError(f"{path} is an adapter of the method {method}, which cannot share a model: open it alone.")
        if alone := [key for key in ALONE if content.get(key) not in (None, False, "none", [], {})]:
            raise UsageError(f"{path} is an adapter with {alone[0]}, which cannot share a model: open it alone.")
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in stored_weights(path).items():
            place, _, kind = _KIND.sub(" ", key.removeprefix(PREFIX), 1).partition(" ")
            if kind.startswith(ROWS[1:]):
                ids = (content.get("trainable_token_indices") or {}).get(place)
                matrix = _wrapped(model, place, ChangedRows, active, path)
                matrix.changes[name] = _rows(place, ids, value, matrix.weight.shape, path)
                continue
            if place not in layers or not kind:
                raise _misfit(path, f"the model has no linear layer {place}")
            found.setdefault(place, {})[kind] = value
        for place, parts in found.items():
            changed = _wrapped(model, place, Changed, active, path)
            changed.changes[name] = _change(method, content, place, parts, layers[place], path)
    return active


def _wrapped(model: M6, place: str, kind: type[C], active: Active, path: Path) -> C:
    """The layer at a place of the network, wrapped so that it can have changes."""
    parent, _, name = place.rpartition(".")
    layer = getattr(model.get_submodule(parent), name, None)
    if not isinstance(layer, kind):
        if not isinstance(layer, nn.Embedding | nn.Linear):
            raise _misfit(path, f"the model has no matrix {place}")
        layer = kind(layer, active)
        setattr(model.get_submodule(parent), name, layer)
    return layer


def _rows(place: str, ids: list[int] | None, rows: Tensor, shape: torch.Size, path: Path) -> Rows:
    size, width = shape
    if ids is None or rows.shape != (len(ids), width) or not all(0 <= number < size for number in ids):
        raise _misfit(path, f"its rows of {place} are none of [{size}, {width}]")
    return Rows(ids, rows, size)


def lora_scale(content: dict[str, Any], place: str, rank: int) -> float:
    """The factor of the product B A of one layer, by PEFT's rules."""
    alpha = content["lora_alpha"]
    if pattern := content.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key

        alpha = pattern.get(get_pattern_key(pattern, place), alpha)
    return float(alpha / (math.sqrt(rank) if content.get("use_rslora") else rank))


def _change(
    method: str, content: dict[str, Any], place: str, parts: dict[str, Tensor], layer: nn.Linear, path: Path
) -> nn.Module:
    wide, deep = layer.out_features, layer.in_features
    if method == "lora":
        if parts.keys() != {"lora_A.weight", "lora_B.weight"}:
            raise _misfit(path, f"{place} has {', '.join(sorted(parts))} there, not lora_A.weight and lora_B.weight")
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        if (a.shape[1], b.shape[0]) != (deep, wide):
            raise _misfit(path, f"{place} is [{wide}, {deep}] there and [{b.shape[0]}, {a.shape[1]}] here")
        return Low(a, b, lora_scale(content, place, len(a)))
    if method == "ia3":
        scale, inputs = parts["ia3_l"], len(parts["ia3_l"]) == 1  # PEFT's: [1, in] or [out, 1]
        if scale.numel() != (deep if inputs else wide):
            raise _misfit(path, f"{place} has {deep if inputs else wide} values there and {scale.numel()} here")
        return Scaled(scale, inputs)
    narrow = Bottleneck(wide, int(content["rank"]))
    own = {key.removeprefix("changes."): value for key, value in parts.items()}
    try:
        narrow.load_state_dict(own)
    except RuntimeError as error:
        raise _misfit(path, error) from None
    return narrow.requires_grad_(False).eval()
