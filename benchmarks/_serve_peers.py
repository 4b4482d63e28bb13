"""The other sides of benchmarks/serve.py, processes of their own: `python -m benchmarks._serve_peers KIND MODEL PORT`.

transformers   a Qwen3 checkpoint, `generate` in a plain FastAPI handler
litserve       a bundle, its requests batched by LitServe
"""

from __future__ import annotations

import base64
import sys
from collections import defaultdict
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


def litserve(model: Path, port: int) -> None:
    import litserve

    class Api(litserve.LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:
            from openm6.bundle import Bundle

            self.bundle = Bundle.load(model)

        def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
            return request

        def predict(self, x: list[dict[str, Any]]) -> list[Any]:
            found: list[Any] = [None] * len(x)
            alike = defaultdict(list)
            for number, one in enumerate(x):
                alike[one["task"], str(one.get("decoding"))].append(number)
            for (task, _), numbers in alike.items():
                records = [{k: _value(k, v) for k, v in x[i]["inputs"].items()} for i in numbers]
                answers = self.bundle.run_many(task, records, decoding=x[numbers[0]].get("decoding"))
                for number, answer in zip(numbers, answers, strict=True):
                    found[number] = answer
            return found

        def encode_response(self, output: Any) -> dict[str, Any]:
            return {"answer": output if isinstance(output, (str, dict)) else str(output)}

    server = litserve.LitServer(Api(max_batch_size=16, batch_timeout=0.005), accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


def _value(name: str, value: Any) -> Any:
    return base64.b64decode(value) if name == "photo" else value


if __name__ == "__main__":
    {"transformers": transformers, "litserve": litserve}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
