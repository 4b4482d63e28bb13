"""A side of benchmarks/serve.py, in a process of its own: a session, its requests batched by LitServe.

python -m benchmarks._serve_litserve MODEL PORT
"""

from __future__ import annotations

import base64
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import litserve


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Pickled into LitServe's own processes."""

    path = Path()

    def setup(self, device: str) -> None:
        from openm6.inference.session import Session

        self.session = Session.load(self.path)

    def decode_request(self, request):  # LitServe reads the signature: an annotation makes it a query parameter
        return request

    def predict(self, x: list[dict[str, Any]]) -> list[Any]:
        found: list[Any] = [None] * len(x)
        alike = defaultdict(list)
        for number, one in enumerate(x):
            alike[one["task"], str(one.get("decoding"))].append(number)
        for (task, _), numbers in alike.items():
            records = [{k: _value(k, v) for k, v in x[i]["inputs"].items()} for i in numbers]
            answers = self.session.run_many(task, records, decoding=x[numbers[0]].get("decoding"))
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer
        return found

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"answer": output if isinstance(output, (str, dict)) else str(output)}


def _value(name: str, value: Any) -> Any:
    return base64.b64decode(value) if name == "photo" else value


if __name__ == "__main__":
    api = Api(max_batch_size=16, batch_timeout=0.005)
    api.path = Path(sys.argv[1])
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
