"""The chat form of a checkpoint, read from its files, and kept in a model directory.

chat_template.jinja         the template, verbatim
generation_config.json      end tokens and sampling, verbatim
openm6.json, `chat`         what the template is given, and the sampling as decoding options (tasks/card.py)"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from openm6.core.errors import OpenM6Error
from openm6.tasks.card import load_template
from openm6.tasks.chat import TEMPLATE, ChatFormat, end_of, sampling_of

GENERATION = "generation_config.json"
JSON_LIMIT = 64 * 2**20
"""Bytes of a JSON file of a checkpoint, at most."""
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class CheckpointChat(NamedTuple):
    """How a checkpoint is asked: its form, and the tokens that end its answers, the template's own first."""

    format: ChatFormat
    ends: tuple[str, ...]


def json_of(file: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where there is none. Raises OpenM6Error for a damaged or too large one."""
    if not file.is_file():
        return {}
    if file.stat().st_size > JSON_LIMIT:
        raise OpenM6Error(f"{file} has more than {JSON_LIMIT // 2**20} MiB.")
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise OpenM6Error(f"{file} is not valid JSON.") from None


def read_chat(path: Path, fast: tokenizers.Tokenizer) -> CheckpointChat | None:
    """That of a Hugging Face directory; None for one without a template. Raises what `make_chat` does."""
    about, generation = json_of(path / "tokenizer_config.json"), json_of(path / GENERATION)
    file, template = path / TEMPLATE, about.get("chat_template")
    if file.is_file():
        template = load_template(path)
    elif isinstance(template, list):  # several by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    return make_chat(path, template, {**json_of(path / "special_tokens_map.json"), **about}, generation, fast)


def gguf_generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json would say of the end tokens of a GGUF file."""
    numbers = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return {"eos_token_id": [number for number in dict.fromkeys(numbers) if type(number) is int]}


def make_chat(
    path: Path, template: str, names: Mapping[str, Any], generation: Mapping[str, Any], fast: tokenizers.Tokenizer
) -> CheckpointChat:
    """`names`: special tokens as tokenizer_config.json has them. Raises OpenM6Error or UsageError, with the path, for a
    template that does not render, or after whose answers no special token stands."""
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in names.items()}
    tokens = {name: text for name in _TOKENS if isinstance(text := texts.get(name), str)}
    special = {one.content for one in fast.get_added_tokens_decoder().values() if one.special}
    chosen = ChatFormat(template, tokens, date.today().isoformat(), sampling=sampling_of(generation))
    try:
        end = end_of(chosen, special)
    except OpenM6Error as error:
        raise type(error)(f"{path}: {error}") from None
    given = generation.get("eos_token_id", [])
    more = [
        fast.id_to_token(number) for number in (given if isinstance(given, list) else [given]) if number is not None
    ]
    ends = dict.fromkeys([end, *more, tokens.get("eos_token")])
    return CheckpointChat(chosen, tuple(one for one in ends if one in special))
