"""The commands of the page on open models, with SmolLM2's real weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openm6.core.environment import DTYPE

QUESTION = "What is the capital of France?"
TURNS = json.dumps([{"role": "user", "content": QUESTION}])
EXACT = {**os.environ, DTYPE: "float32"}


def openm6(*arguments: object) -> str:
    command = [sys.executable, "-m", "openm6", *map(str, arguments)]
    return subprocess.run(command, env=EXACT, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


@pytest.fixture(scope="module")
def imported(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "smollm2"
    openm6("models", "import", gguf, output)
    return output


@pytest.fixture(scope="module")
def answer(imported: Path) -> str:
    return openm6("run", imported, "chat", f"messages={TURNS}", "-o", "max_new_tokens=24")


def test_it_is_asked_at_once_and_tells_its_licence(imported: Path, answer: str) -> None:
    assert "Paris" in answer
    assert "Paris" in openm6("run", imported, "question_answering_en", f"question={QUESTION}")
    assert "apache-2.0" in openm6("models", "show", imported, "--json")
    label = openm6("run", imported, "text_classification_en", "text=I love it.", "choices=positive,negative")
    assert label == "positive"


@pytest.fixture(scope="module")
def client(imported: Path) -> Iterator[openai.OpenAI]:
    serve = [sys.executable, "-m", "openm6", "serve", str(imported), "--port", "8766"]
    process = subprocess.Popen(serve, env=EXACT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if "http" in line)
    yield openai.OpenAI(base_url="http://127.0.0.1:8766/v1", api_key="none", max_retries=5)
    process.terminate()
    process.wait()


def test_it_is_served(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.chat.completions.create(model="smollm2", messages=turns, max_tokens=24).choices[0].message.content
    assert first and "Paris" in first
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And of Germany?"}]
    second = client.chat.completions.create(model="smollm2", messages=turns, max_tokens=24).choices[0].message.content
    assert second and "Berlin" in second


def test_it_learns_from_conversations(imported: Path, tmp_path: Path) -> None:
    names = ("Anna", "Ben", "Cleo", "Dan", "Eve", "Finn")
    talks = [
        {"messages": [{"role": "user", "content": f"My name is {name}. Greet me."},
                      {"role": "assistant", "content": f"Ahoy, {name}!"}]}
        for name in names
    ]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)), "utf-8")
    told = json.dumps([{"role": "user", "content": "My name is Zoe. Greet me."}])
    before = openm6("run", imported, "chat", f"messages={told}")
    openm6(
        "finetune", imported, "--task", "chat", "--data", tmp_path / "talks.jsonl", "--method", "lora", "--steps", 30,
        "--batch-size", 6, "--output", tmp_path / "run", "train.learning_rate=1e-3",
    )  # fmt: skip
    assert openm6("run", tmp_path / "run" / "model", "chat", f"messages={told}") == "Ahoy, Zoe!" != before


@torch.no_grad()
def test_it_is_handed_on_to_transformers(imported: Path, answer: str, tmp_path: Path) -> None:
    openm6("models", "export", imported, tmp_path / "out", "--format", "huggingface")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == answer
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_it_is_handed_on_to_llama_cpp(imported: Path, answer: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    openm6("models", "export", imported, tmp_path / "out", "--format", "gguf", "--dtype", "bf16")
    (file,) = (tmp_path / "out").glob("*.gguf")
    opened = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False)
    turns = [{"role": "user", "content": QUESTION}]
    found = opened.create_chat_completion(turns, temperature=0.0, max_tokens=24, repeat_penalty=1.0)
    assert found["choices"][0]["message"]["content"] == answer
    opened.close()
