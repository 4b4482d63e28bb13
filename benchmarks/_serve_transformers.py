"""A side of benchmarks/serve.py, in a process of its own: a Qwen3 checkpoint, `generate` in a plain FastAPI handler.

python -m benchmarks._serve_transformers MODEL PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def transformers(model: Path, port: int) -> None:
    import torch
    import uvicorn
    from fastapi import FastAPI
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, Qwen3ForCausalLM

    from openm6.model.precision import fast_dtype

    network = Qwen3ForCausalLM.from_pretrained(model).eval().to(fast_dtype("cpu"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    app = FastAPI()

    @app.post("/run")
    def run(body: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([tokenizer.encode(body["inputs"]["text"], add_special_tokens=False).ids])
        count = body["decoding"]["max_new_tokens"]
        options = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            found = network.generate(ids, generation_config=options)[0, ids.shape[1] :]
        return {"text": tokenizer.decode(found.tolist())}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    transformers(Path(sys.argv[1]), int(sys.argv[2]))
