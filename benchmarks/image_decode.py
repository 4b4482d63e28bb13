"""The codes of a picture in a few passes against one after the other with a cache, on the same weights.

Time with random weights, at 64, 256 and 4,096 codes, these with block-sparse attention. Where `make demo-images` has
left its model, its judge says how many pictures show all that was asked for, drawn both ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import race
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, Sequence
from openm6.inference.draw import Codes, Drawing, draw
from openm6.model import M6, ModelConfig
from openm6.model.cpu.pack import pack_for_cpu

TITLE = "A picture's codes in 8 passes against one after the other"
PROMPT, PASSES, ASKED = 24, 8, 200
DEMO = Path("runs/demo-images")
SHAPES = ((8, 5), (16, 5), (64, 3))
"""Codes of a picture's side, and how often each way of drawing is timed."""


def run(shapes: Iterable[tuple[int, int]] = SHAPES) -> tuple[list[dict[str, Any]], str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 704,
        "vocab_size": 4096, "max_position_embeddings": 4352, "image_embedder": "none",
    }  # fmt: skip
    blocks = np.array([*[SOURCE] * (PROMPT - 2), CAUSAL, CAUSAL], np.int32)
    prompt = Sequence(np.arange(100, 100 + PROMPT, dtype=np.int32), blocks, np.full(PROMPT, IGNORE, np.int32))
    rows = []
    for side, repeats in shapes:
        count = side**2
        model = M6(ModelConfig.preset("demo", **sizes, picture_side=side if side == 64 else None)).eval().to(device)
        model = model.to(torch.bfloat16) if device == "cuda" else pack_for_cpu(model)
        codes = Codes(3096, 1000, count, 6, (11, 12, 13), 14, 15)

        def drawn(passes: int, model: M6 = model, codes: Codes = codes) -> object:
            return draw(model, [prompt], [], codes, Drawing(passes=passes))

        sides = {f"{PASSES} passes": lambda: drawn(PASSES), "one after the other": lambda: drawn(0)}
        timings = race(sides, repeats=repeats, warmup=1)
        slow = timings["one after the other"]
        for name, t in timings.items():
            rows.append({
                "codes": count, "side": name, "ms": round(1000 * t.median, 1),
                "spread": f"{1000 * t.low:,.1f} to {1000 * t.high:,.1f}", "faster by": round(slow.median / t.median, 1),
                "all attributes": accuracy(PASSES if "passes" in name else 0) if count == 64 else "",
            })  # fmt: skip
    note = (
        f"hidden size 256, 6 layers, a prompt of {PROMPT}, one picture, no guidance; medians of runs taken in turn, "
        f"spread = quartiles; 4,096 codes with block-sparse attention. All attributes: the model of make demo-images "
        f"on {ASKED} combinations it has never seen."
    )
    return rows, note


def accuracy(passes: int) -> float | str:
    """Share of the pictures in which the demo's judge reads all that was asked for."""
    if not (DEMO / "model").is_dir():
        return ""
    from openm6.evaluate.demo_images import DATA, TASK
    from openm6.evaluate.pictures import Judge, judged, read_prompts
    from openm6.inference.session import Session

    session, judge = Session.load(DEMO / "model"), Judge(Session.load(DEMO / "judge" / "model"))
    records, wanted = read_prompts(session, TASK, judge, DATA, ASKED)
    asked = [{"caption": record["caption"]} for record in records]
    pictures = list(session.run_many(TASK, asked, decoding={"passes": passes, "seed": 0}))
    return float(np.mean([row["all"] for row in judged(judge, pictures, wanted)]))
