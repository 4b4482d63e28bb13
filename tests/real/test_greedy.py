"""Greedy answers of SmolLM2 by `openm6 run`, in Python and over HTTP, against transformers' generate in fp32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from openm6.core.batch import pad
from openm6.core.environment import DTYPE
from openm6.core.tokenizer import HALF
from openm6.inference.session import Session
from openm6.tasks.library import get
from tests.conftest import exact

NEW = 32
PROMPTS = [
    "What is the capital of France?", "Name three colours.", "Tell me a joke about a cat.", "What is 2 + 2?",
    "Write a haiku about rain.", "Who wrote Hamlet?", "Translate 'good morning' into Spanish.", "Say hello.",
    "What is photosynthesis?", "Give me a recipe for pancakes.", "Why is the sky blue?", "What is a prime number?",
    "List the days of the week.", "How do I boil an egg?", "What is the opposite of hot?", "Describe the moon.",
    "今天天气怎么样？", "Complete: the quick brown fox", "What is the largest ocean?", "  blanks around  \n",
    "<|im_end|> is a token, isn't it?",
]  # fmt: skip
Said = Callable[[str], str]


@pytest.fixture(scope="module")
def expected(theirs: tuple[Any, Any]) -> Callable[[str], tuple[list[int], list[int]]]:
    """The ids of a prompt, and of its greedy answer."""
    model, tokenizer = theirs

    def answer(prompt: str) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        asked = torch.tensor([ids])
        whole = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=NEW)
        said = whole[0, len(ids) :].tolist()
        return ids, [token for token in said if token != tokenizer.eos_token_id]

    return answer


@torch.no_grad()
def is_close(session: Session, ids: list[int], one: list[int], other: list[int], theirs: tuple[Any, Any]) -> bool:
    """Where two answers part, the two best logits are within 1e-4, and ours are theirs within 1e-3."""
    place = next(n for n in range(len(one) + 1) if one[: n + 1] != other[: n + 1])
    logits = theirs[0](torch.tensor([[*ids, *one[:place]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return best - second < 1e-4


@pytest.mark.parametrize("prompt", [prompt for prompt in PROMPTS if "<|" not in prompt])
def test_in_python(prompt: str, smollm2: Path, expected: Callable[..., Any], theirs: tuple[Any, Any]) -> None:
    session = exact(Session.load(smollm2, trainable=True))
    ids, said = expected(prompt)
    asked = session.prompt(get("chat"), {"messages": [{"role": "user", "content": prompt}]})
    assert asked.ids.tolist() == ids
    found = session.generate(get("chat"), [asked], decoding={"max_new_tokens": NEW})[0].ids
    assert found == said or is_close(session, ids, found, said, theirs)


@torch.no_grad()
def test_the_logits_are_those_of_transformers(smollm2: Path, theirs: tuple[Any, Any]) -> None:
    session = exact(Session.load(smollm2, trainable=True))
    asked = session.prompt(get("chat"), {"messages": [{"role": "user", "content": PROMPTS[0]}]})
    ours = session.model.logits(session.model(pad([asked], 0)).hidden)[0]
    expected = theirs[0](torch.from_numpy(asked.ids)[None].long()).logits[0]
    torch.testing.assert_close(ours[:, : expected.shape[1]], expected, atol=1e-3, rtol=1e-4)


EXACT = {**os.environ, DTYPE: "float32"}
ASKED = [prompt for prompt in PROMPTS if "<|" not in prompt]  # transformers takes these for special tokens


@pytest.fixture(scope="module")
def texts(expected: Callable[..., Any], theirs: tuple[Any, Any]) -> list[str]:
    """transformers' answers, without a character that is cut in two at their end."""
    said = [theirs[1].decode(expected(prompt)[1], skip_special_tokens=True) for prompt in ASKED]
    return [text.rstrip(HALF) for text in said]


def test_by_the_command_line(smollm2: Path, texts: list[str], tmp_path: Path) -> None:
    data, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) for prompt in ASKED]
    data.write_text("\n".join(lines), "utf-8")
    command = ["predict", str(smollm2), "chat", "--data", str(data), "--output", str(output)]
    subprocess.run(
        [sys.executable, "-m", "openm6", *command, "-o", f"max_new_tokens={NEW}"], env=EXACT, check=True
    )  # fmt: skip
    assert [json.loads(line)["answer"] for line in output.read_text("utf-8").splitlines()] == texts


@pytest.fixture(scope="module")
def url(smollm2: Path) -> Iterator[str]:
    serve = [sys.executable, "-m", "openm6", "serve", str(smollm2), "--port", "8765"]
    process = subprocess.Popen(serve, env=EXACT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "http" in line:
            break
    yield "http://127.0.0.1:8765"
    process.terminate()
    process.wait()


def test_over_http(url: str, texts: list[str]) -> None:
    found = []
    for prompt in ASKED:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": NEW}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        found.append(answer["choices"][0]["message"]["content"])
    assert found == texts
