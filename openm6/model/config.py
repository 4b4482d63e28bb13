"""ModelConfig: every size of the network, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from openm6.core.errors import UsageError, suggest
from openm6.core.sequence import SOURCE_BLOCKS
from openm6.model.network import NetworkConfig
from openm6.model.presets import find_preset
from openm6.model.routers import ROUTERS

_CHOICES = {
    "norm": ("rms", "layer"),
    "activation": ("swiglu", "gelu"),
    "positions": ("rotary", "learned"),
    "image_embedder": ("none", "patch", "stem", "resnet"),
    "router": tuple(ROUTERS),
    "source": tuple(SOURCE_BLOCKS),
}
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor", "original_max_position_embeddings"), _YARN_OPTIONS),
}
"""By `rope_type`, the keys that a rotary scaling needs and those that it may have."""


@dataclass
class ModelConfig(NetworkConfig):
    """The sizes of an M6.

    The modern block (`norm="rms"`, `activation="swiglu"`, `positions="rotary"`) is the default; the papers'
    block is `norm="layer"`, `activation="gelu"`, `positions="learned"`, and has biases.

    Derived when not given: `num_key_value_heads` (= heads), `head_dim` (= hidden_size / heads), `bias`
    (only with LayerNorm), `qkv_bias` (of queries, keys and values; = bias), `stem_widths`,
    `expert_intermediate_size` (= intermediate_size). `num_codes` of the `vocab_size` ids, the last ones, are image
    codes.

    `rotary_scaling` scales rotary positions to longer texts (model/rotary.py); null does not.

    Experts (model/experts.py): `num_experts` in every `expert_interval`-th layer (n, 2n, ...), the first `dense_layers`
    layers excepted; `experts_per_token` of them, chosen by `router`, see each token, and one of the width
    `shared_intermediate_size` sees all. `capacity_factor` None drops no token. `auxiliary_loss`, `router_z_loss` and
    `bias_update` are off at 0.

    `picture_side` n: the n x n codes of a drawn picture see each other by tiles of `picture_tile` (rows, columns):
    tile row, tile column and neighbours (model/sparse.py); null lets all of them see each other.

    `heads`: name and outputs of linear layers on the state where an answer would begin (tasks/heads.py).

    `weight_bits` 8 or 4: the directory holds weights in so few bits (model/lowbit.py).

    `distinct_layers` d shares weights: layer i is layer i mod d (Pseudo-to-Real, arXiv 2110.03888); null shares none.

    `source` "causal": a position of a source sees only those before it, as in a decoder-only language model.
    """

    model_type: ClassVar[str] = "openm6"

    vocab_size: int = 21128
    num_codes: int = 0
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    distinct_layers: int | None = None
    num_attention_heads: int = 16
    num_key_value_heads: int = None  # type: ignore[assignment]  # derived below, like the next two
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    picture_side: int | None = None
    picture_tile: list[int] = None  # type: ignore[assignment]  # [4, 8]

    norm: str = "rms"
    norm_eps: float = 1e-6
    activation: str = "swiglu"
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    rotary_scaling: dict | None = None
    qk_norm: bool = False
    bias: bool = None  # type: ignore[assignment]
    qkv_bias: bool = None  # type: ignore[assignment]
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    source: str = "bidirectional"

    image_embedder: str = "patch"
    image_patch: int = 16
    image_max_patches: int = 256
    stem_widths: list[int] | None = None
    resnet: dict | None = None

    heads: dict | None = None

    weight_bits: int | None = None

    num_experts: int = 0
    expert_interval: int = 1
    dense_layers: int = 0
    experts_per_token: int = 1
    router: str = "topk"
    normalize_expert_weights: bool = False
    expert_intermediate_size: int = None  # type: ignore[assignment]
    shared_intermediate_size: int = 0
    capacity_factor: float | None = None
    auxiliary_loss: float = 0.0
    router_z_loss: float = 0.0
    bias_update: float = 0.0

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.bias is None:
            self.bias = self.norm == "layer"
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        self.picture_tile = self.picture_tile or [4, 8]
        self.heads = self.heads or {}
        self.expert_intermediate_size = self.expert_intermediate_size or self.intermediate_size
        if self.image_embedder == "stem" and self.stem_widths is None:
            self.stem_widths = [32, 64, 128, 256]
        self._check()

    def _check(self) -> None:
        for key, values in _CHOICES.items():
            if getattr(self, key) not in values:
                raise UsageError(f'model.{key} is "{getattr(self, key)}"; it can be {", ".join(values)}.')
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model.num_attention_heads ({self.num_attention_heads}) has to be a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UsageError(f"model.head_dim ({self.head_dim}) has to be even for rotary positions.")
        if self.rotary_scaling is not None:
            self._check_scaling(self.rotary_scaling)
        if self.weight_bits not in (None, 4, 8):
            raise UsageError(f"model.weight_bits is {self.weight_bits}; it can be 8, 4, or null.")
        if self.num_experts:
            self._check_experts()
        if self.distinct_layers is not None:
            self._check_sharing(self.distinct_layers)

    def _check_scaling(self, scaling: dict[str, Any]) -> None:
        kind = scaling.get("rope_type")
        if kind not in _SCALINGS:
            known = ", ".join(_SCALINGS)
            raise UsageError(f"model.rotary_scaling.rope_type is {kind!r}; it can be {known}, or no scaling (null).")
        needed, others = _SCALINGS[kind]
        if absent := [key for key in needed if key not in scaling]:
            raise UsageError(f"model.rotary_scaling has no {absent[0]}, which {kind} needs.")
        for key, value in scaling.items():
            if key not in ("rope_type", *needed, *others):
                raise UsageError(f"model.rotary_scaling has no key {key}.{suggest(key, [*needed, *others])}")
            right = isinstance(value, bool) if key == "truncate" else type(value) in (int, float) and value > 0
            if key != "rope_type" and not right:
                raise UsageError(f"model.rotary_scaling.{key} is {value!r}; give a number above 0.")
        if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise UsageError("model.rotary_scaling.high_freq_factor has to be above low_freq_factor.")
        if self.positions != "rotary":
            raise UsageError(f'model.rotary_scaling needs rotary positions; model.positions is "{self.positions}".')

    def _check_experts(self) -> None:
        number, chosen = self.num_experts, self.experts_per_token
        if not 1 <= chosen <= number:
            raise UsageError(f"model.experts_per_token is {chosen}; with {number} experts it can be 1 to {number}.")
        if number % self.expert_groups:
            raise UsageError(
                f'The router "{self.router}" makes a group for each of model.experts_per_token ({chosen}), so '
                f"model.num_experts ({number}) has to be a multiple of it."
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise UsageError(f"model.capacity_factor is {self.capacity_factor}; give a number above 0, or null.")
        if self.expert_interval < 1 or not self.expert_layers():
            raise UsageError(
                f"With model.expert_interval {self.expert_interval} and model.dense_layers {self.dense_layers}, none "
                f"of the {self.num_hidden_layers} layers has experts."
            )

    def _check_sharing(self, distinct: int) -> None:
        layers, sparse = self.num_hidden_layers, set(self.expert_layers())
        if distinct < 1 or layers % distinct:
            raise UsageError(f"model.distinct_layers is {distinct}; it has to divide the {layers} layers.")
        if any((layer in sparse) != (layer % distinct in sparse) for layer in range(layers)):
            raise UsageError(
                f"model.distinct_layers {distinct} would share a layer of experts with one without; "
                f"experts stand in layers {', '.join(str(layer + 1) for layer in sorted(sparse))}."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named size, with single values changed: `ModelConfig.preset("demo", num_hidden_layers=4)`."""
        sizes = find_preset(name)
        known = {field.name for field in fields(cls)}
        for key in changes:
            if key not in known:
                raise UsageError(f"model has no key {key}.{suggest(key, known)}")
        return cls(**{**sizes, **changes})

    @property
    def image_stride(self) -> int:
        """Pixels a side of one image position."""
        if self.image_embedder == "stem":
            return int(2 ** len(self.stem_widths or ()))
        if self.image_embedder == "resnet":
            return 32
        return self.image_patch

    @property
    def expert_groups(self) -> int:
        """Number of groups of experts. The router chooses one expert of each; with 1 group it chooses among all."""
        return self.experts_per_token if ROUTERS[self.router].has_groups else 1

    def expert_layers(self) -> list[int]:
        """Numbers (from 0) of the layers that hold experts."""
        if not self.num_experts:
            return []
        every = range(self.expert_interval - 1, self.num_hidden_layers, self.expert_interval)
        return [layer for layer in every if layer >= self.dense_layers]
