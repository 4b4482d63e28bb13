"""A whole training step (forward, backward, clipping, AdamW) against transformers' Qwen3 and Llama.

Same sizes, same parameters within the tied embedding, same batch of full causal rows with every position
trained, same precision (bf16 autocast over fp32 weights where the machine has units for it, else fp32), same fused
optimizer. On a GPU the size of M6-base, and M6-base itself in the papers' block; every side as it is and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import causal_batch, race, training_step
from openm6.model import M6, ModelConfig
from openm6.model.count import training_flops
from openm6.model.precision import fast_dtype, peak_flops

TITLE = "Training step against transformers (every position trained)"


class Case(NamedTuple):
    hidden: int
    layers: int
    rows: int
    length: int
    vocabulary: int


ON_CPU = (Case(256, 6, 8, 512, 4096), Case(512, 6, 8, 512, 4096))
ON_GPU = (Case(1024, 24, 16, 1024, 21128),)


def run(cases: Iterable[Case] = ()) -> tuple[list[dict[str, Any]], str]:
    """`cases` defaults to those for this kind of machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fast_dtype(device)
    rows = []
    for case in cases or (ON_GPU if device == "cuda" else ON_CPU):
        heads = case.hidden // 64
        sizes = {
            "hidden_size": case.hidden, "intermediate_size": case.hidden * 11 // 4, "num_hidden_layers": case.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64, "vocab_size": case.vocabulary,
            "tie_word_embeddings": True,
        }  # fmt: skip
        ids = np.random.default_rng(0).integers(0, case.vocabulary, (case.rows, case.length + 1))
        ours = {"OpenM6": ModelConfig(**sizes, qk_norm=True, image_embedder="none")}
        if device == "cuda":
            ours["OpenM6, M6-base"] = ModelConfig.preset("m6-base", image_embedder="none")
        sides = {}
        for way in ("", ", compiled") if device == "cuda" else ("",):
            for name, config in ours.items():
                model = M6(config).to(device)
                sides[name + way] = _ours(_compiled(model, model.blocks, way), ids)
            for name, theirs in (
                ("Qwen3", Qwen3ForCausalLM(Qwen3Config(**sizes))), ("Llama", LlamaForCausalLM(LlamaConfig(**sizes)))
            ):  # fmt: skip
                sides[f"transformers {name}{way}"] = _theirs(
                    _compiled(theirs.to(device), theirs.model.layers, way), ids
                )
        peak = peak_flops.__wrapped__(device, dtype)
        timings = race(sides)
        tokens = case.rows * case.length
        mine = timings["OpenM6"].median
        for name, t in timings.items():
            config = ours.get(name.removesuffix(", compiled"), ours["OpenM6"])
            flops = training_flops(config, tokens, tokens * case.length // 2, tokens)
            rows.append({
                "precision": str(dtype).removeprefix("torch."), **case._asdict(), "side": name,
                "tokens/s": round(tokens / t.median),
                "spread": f"{tokens / t.high:,.0f} to {tokens / t.low:,.0f}",
                "TFLOP/s": flops / t.median / 1e12, "share of matmul peak": round(flops / t.median / peak, 3),
                "OpenM6 is faster by": round(t.median / mine, 2),
            })  # fmt: skip
    note = (
        "Rows of so many positions; median of 9 steps in turn, spread = quartiles. FLOPs count the causal half of "
        f"attention. Peak: the best square product just before, {peak / 1e12:,.2f} TFLOP/s."
    )
    return rows, note


def _compiled(model: Any, layers: Iterable[nn.Module], way: str) -> Any:
    """Layer by layer, as `train.compile` does."""
    if way:
        for layer in layers:
            layer.compile()
    return model


def _ours(model: M6, ids: np.ndarray) -> Callable[[], object]:
    batch = causal_batch(ids).to(model.embed.weight.device)
    return partial(training_step(model), lambda: model(batch).loss / batch.labels.numel())


def _theirs(model: nn.Module, ids: np.ndarray) -> Callable[[], object]:
    # Their loss shifts by itself: 512 inputs train 511 positions, one fewer a row than ours.
    inputs = torch.from_numpy(ids[:, :-1]).to(next(model.parameters()).device)
    return partial(training_step(model), lambda: model(input_ids=inputs, labels=inputs, use_cache=False).loss)
