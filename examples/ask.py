"""Ask a served model by OpenAI's own client:

python examples/ask.py runs/demo/pictures/goods-1.jpg 图中的商品是什么颜色?
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI


def main(picture: str, question: str) -> None:
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    content = [
        {"type": "text", "text": question},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
    ]
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": content}]
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
