"""The parameters and the FLOPs of a network, counted by arithmetic."""

from __future__ import annotations

from openm6.core.batch import Batch, count_pairs
from openm6.core.sequence import CAUSAL
from openm6.model.config import ModelConfig
from openm6.model.embed import ImageEmbedder
from openm6.model.network import without_memory
from openm6.model.sparse import SparsePattern


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, by arithmetic: nothing is allocated, so any preset can be counted.

    Parts: embedding, attention, feed_forward (dense layers), experts, shared_experts, router, norms, image, head.
    """
    d, layers = config.hidden_size, config.distinct_layers or config.num_hidden_layers
    norm = d * (2 if config.norm == "layer" else 1)
    learned = config.max_position_embeddings * d if config.positions == "learned" else 0
    return {
        "embedding": config.vocab_size * d + learned,
        **_count_products(config),
        "norms": (2 * layers + 1) * norm + (2 * layers * config.head_dim if config.qk_norm else 0),
        "image": _count_image(config),
        "head": (0 if config.tie_word_embeddings else config.vocab_size * d)
        + sum((d + 1) * outputs for outputs in (config.heads or {}).values()),
    }


def _count_products(config: ModelConfig) -> dict[str, int]:
    """The weights of the layers that every position meets."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.distinct_layers or config.num_hidden_layers
    heads, kv, width, bias = config.num_attention_heads, config.num_key_value_heads, config.head_dim, int(config.bias)
    qkv, gates = (heads + 2 * kv) * width, 2 if config.activation == "swiglu" else 1
    feed_forward, per_width = gates * d * f + f * d + bias * (gates * f + d), (gates + 1) * d
    with_experts = sum(layer < layers for layer in config.expert_layers())
    return {
        "attention": layers * (d * qkv + heads * width * d + config.qkv_bias * qkv + bias * d),
        "feed_forward": (layers - with_experts) * feed_forward,
        "experts": with_experts * config.num_experts * per_width * config.expert_intermediate_size,
        "shared_experts": with_experts * per_width * config.shared_intermediate_size,
        "router": with_experts * config.num_experts * d,
    }


def _count_image(config: ModelConfig) -> int:
    if config.image_embedder == "none":
        return 0
    with without_memory():
        return sum(p.numel() for p in ImageEmbedder(config).parameters())


def attention_pairs(config: ModelConfig, batch: Batch) -> int:
    """Pairs of query and key that attention multiplies in a batch: those of the mask rule, and among the codes of a
    block-sparse image those of the tiles that its pattern keeps."""
    pairs = count_pairs(batch.segments, batch.blocks)
    if batch.codes is None or not config.picture_side:
        return pairs
    codes, one_by_one = len(batch.codes), bool(batch.blocks[0, batch.codes.start] == CAUSAL)
    dense = codes * (codes + 1) // 2 if one_by_one else codes**2
    kept = round(SparsePattern.of(config, one_by_one).kept_share * codes**2)
    return pairs - len(batch.ids) * (dense - kept)


def training_flops(config: ModelConfig, positions: int, pairs: int, trained: int) -> float:
    """FLOPs of a forward and backward pass: 6 for every weight and position that meet, attention and head apart.
    Of the experts those count that a token sees.

    positions: real ones (no padding). pairs: see `attention_pairs`. trained: positions with a
    label (the only ones that reach the head). The image embedder is left out, so the figure is a little low.
    """
    parts = _count_products(config)
    seen = parts["experts"] * config.experts_per_token / max(1, config.num_experts)
    weights = parts["attention"] + parts["feed_forward"] + parts["shared_experts"] + parts["router"] + seen
    weights *= config.num_hidden_layers / (config.distinct_layers or config.num_hidden_layers)  # shared, but run again
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return 6.0 * weights * positions + attention + 6.0 * config.vocab_size * config.hidden_size * trained
