"""Greedy decoding against transformers' generate, batch 1 and 16, on the same weights.

A Qwen3 checkpoint with random weights is imported, so both sides compute the same function; the share of
equal ids is printed too. Precision: fp32 on both sides and, where the machine has units for it, bf16 weights and
products on both sides (what each side serves with).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import race
from openm6.core.sequence import CAUSAL, IGNORE, Sequence
from openm6.inference import Decoding, generate
from openm6.model import M6
from openm6.model.cpu.pack import pack_for_cpu
from openm6.model.files import load_model
from openm6.model.precision import fast_dtype
from openm6.weights.import_checkpoint import import_weights, open_checkpoint

TITLE = "Greedy decoding against transformers' generate"
PROMPT, NEW, VOCABULARY = 64, 64, 4096


def run(
    hidden_sizes: tuple[int, ...] = (256, 512), batches: tuple[int, ...] = (1, 16), new: int = NEW
) -> tuple[list[dict[str, Any]], str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for hidden in hidden_sizes:
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=6,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        theirs = Qwen3ForCausalLM(config).eval().to(device)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            base = _imported(Path(folder)).eval().to(device)
        for precision in ("fp32", "bf16") if fast_dtype(device) == torch.bfloat16 else ("fp32",):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            theirs = theirs.to(dtype)
            ours = copy.deepcopy(base)
            ours = ours.to(dtype) if device == "cuda" else pack_for_cpu(ours, dtype)
            for batch in batches:
                ids = np.random.default_rng(batch).integers(0, VOCABULARY, (batch, PROMPT))
                sides = {"OpenM6": _ours(ours, ids, new), "transformers": _theirs(theirs, ids, new)}
                same = float(np.mean(np.array(sides["OpenM6"]()) == np.array(sides["transformers"]())))
                timings = race(sides, repeats=7)
                mine = timings["OpenM6"].median
                for name, t in timings.items():
                    rows.append({
                        "hidden": hidden, "weights": precision, "batch": batch, "side": name,
                        "tokens/s": round(batch * new / t.median),
                        "spread": f"{batch * new / t.high:,.0f} to {batch * new / t.low:,.0f}",
                        "OpenM6 is faster by": round(t.median / mine, 2), "equal tokens": round(same, 3),
                    })  # fmt: skip
    note = (
        f"6 layers, prompts of {PROMPT}, {new} new tokens, vocabulary {VOCABULARY}; median of 7 runs taken in turn, "
        "spread = quartiles."
    )
    return rows, note


def _ours(model: M6, ids: np.ndarray, new: int) -> Callable[[], list[list[int]]]:
    prompts = [
        Sequence(row.astype(np.int32), np.full(PROMPT, CAUSAL, np.int32), np.full(PROMPT, IGNORE, np.int32))
        for row in ids
    ]
    options = Decoding(max_new_tokens=new)
    return lambda: [answer.ids for answer in generate(model, prompts, end_ids=[-1], decoding=options)]


def _imported(folder: Path) -> M6:
    checkpoint, output = open_checkpoint(folder), folder / "m6"
    checkpoint.config.save(output)
    import_weights(checkpoint, checkpoint.config, output, lambda done, total: None)
    return load_model(output)


def _theirs(model: Qwen3ForCausalLM, ids: np.ndarray, new: int) -> Callable[[], list[list[int]]]:
    inputs = torch.from_numpy(ids).to(model.device)
    options = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def decode() -> list[list[int]]:
        return model.generate(inputs, generation_config=options)[:, PROMPT:].tolist()

    return decode
