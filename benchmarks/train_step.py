"""A whole training step (forward, backward, clipping, AdamW) against transformers' Qwen3 and Llama.

Same sizes, same parameters within the tied embedding, same batch of full causal rows with every position
trained, same precision (bf16 autocast over fp32 weights where the machine has units for it, else fp32), same fused
optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import race
from openm6.model import M6, ModelConfig
from openm6.model.precision import fast_dtype
from openm6.sequence import CAUSAL, Sequence, pack
from openm6.train.meters import peak_flops, training_flops

TITLE = "Training step against transformers (every position trained)"
LAYERS, ROWS, LENGTH, VOCABULARY = 6, 8, 512, 4096


def run() -> tuple[list[dict[str, Any]], str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fast_dtype(device)
    rows = []
    for hidden in (256, 512):
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "head_dim": 64,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
        }
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1))
        ours = ModelConfig(**sizes, qk_norm=True, image_embedder="none")
        sides = {
            "OpenM6": _ours(M6(ours).to(device), ids),
            "transformers Qwen3": _theirs(Qwen3ForCausalLM(Qwen3Config(**sizes)).to(device), ids),
            "transformers Llama": _theirs(LlamaForCausalLM(LlamaConfig(**sizes)).to(device), ids),
        }
        peak = peak_flops.__wrapped__(device, dtype)
        timings = race(sides)
        tokens = ROWS * LENGTH
        flops = training_flops(ours, tokens, ROWS * LENGTH * LENGTH // 2, tokens)
        mine = timings["OpenM6"].median
        for name, t in timings.items():
            rows.append({
                "precision": str(dtype).removeprefix("torch."), "hidden": hidden, "side": name,
                "tokens/s": round(tokens / t.median),
                "spread": f"{tokens / t.high:,.0f} to {tokens / t.low:,.0f}",
                "TFLOP/s": flops / t.median / 1e12, "share of matmul peak": round(flops / t.median / peak, 3),
                "OpenM6 is faster by": round(t.median / mine, 2),
            })  # fmt: skip
    note = (
        f"{LAYERS} layers, {ROWS} rows of {LENGTH} positions, vocabulary {VOCABULARY}; median of 9 steps in turn, "
        "spread = quartiles. FLOPs count the causal half of attention. Peak: best 2048 x 2048 product just before."
    )
    return rows, note


def _ours(model: M6, ids: np.ndarray) -> Callable[[], object]:
    rows = [
        Sequence(row[:-1].astype(np.int32), np.full(LENGTH, CAUSAL, np.int32), row[1:].astype(np.int32)) for row in ids
    ]
    batch = pack(rows, LENGTH, 0).to(model.device)

    def loss() -> torch.Tensor:
        return model(batch).loss / batch.labels.numel()

    return _step(model, loss)


def _theirs(model: nn.Module, ids: np.ndarray) -> Callable[[], object]:
    # Their loss shifts by itself: 512 inputs train 511 positions, one fewer a row than ours.
    inputs = torch.from_numpy(ids[:, :-1]).to(next(model.parameters()).device)

    def loss() -> torch.Tensor:
        return model(input_ids=inputs, labels=inputs, use_cache=False).loss

    return _step(model, loss)


def _step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kind = next(model.parameters()).device.type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=fast_dtype(kind) == torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
