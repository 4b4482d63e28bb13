"""The tokenizer that the metadata of a GGUF file describe (`tokenizer.ggml.*`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from openm6.core.errors import OpenM6Error, UsageError

_PREFIX = "tokenizer.ggml."
_CONTROL, _OWN, _UNUSED = 3, 4, 5
"""Values of `token_type`."""


class _Pre(NamedTuple):
    """How a byte-level vocabulary cuts texts before merging, as its tokenizer.json does: at a pattern, or one digit
    from the other; whether texts are brought to the form NFC; whether a piece that is a token needs no merges."""

    split: str | None
    nfc: bool = False
    ignore_merges: bool = False


def _known() -> dict[str, _Pre]:
    """By `tokenizer.ggml.pre`. The patterns are those that transformers has for them."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as splits

    llama3 = _Pre(splits["llama-bpe"], ignore_merges=True)
    return {
        "qwen2": _Pre(splits["qwen2"], nfc=True), "llama-bpe": llama3, "llama3": llama3, "llama-v3": llama3,
        "tekken": _Pre(splits["tekken"], ignore_merges=True), "smollm": _Pre(None),
    }  # fmt: skip


def gguf_tokenizer(fields: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE (`gpt2`: Llama 3, Qwen, SmolLM) or SentencePiece's (`llama`). Raises UsageError for others."""
    kind, tokens = fields.get(f"{_PREFIX}model"), fields.get(f"{_PREFIX}tokens")
    types = fields.get(f"{_PREFIX}token_type") or [1] * len(tokens or ())
    if not isinstance(tokens, list) or len(set(tokens)) < len(tokens) or len(types) != len(tokens):
        raise OpenM6Error(
            f"{path} is damaged: {_PREFIX}tokens are missing, repeat, or have no {_PREFIX}token_type each."
        )
    used = {token: number for number, token in enumerate(tokens) if types[number] != _UNUSED}
    try:
        if kind == "gpt2":
            fast = _byte_level(fields, used, path)
        elif kind == "llama":
            fast = _sentencepiece(fields, used)
        else:
            raise UsageError(f"{path}: {_PREFIX}model is {kind!r}; what can be imported: gpt2, llama.")
        chosen = {token: types[number] for token, number in used.items() if types[number] in (_CONTROL, _OWN)}
        fast.add_tokens([AddedToken(t, normalized=False, special=kind == _CONTROL) for t, kind in chosen.items()])
    except (OpenM6Error, ImportError):
        raise
    except Exception as error:  # the library raises plain Exception for tokens and merges that do not fit
        raise OpenM6Error(f"{path}: its tokenizer is damaged ({type(error).__name__}).") from None
    return fast


def _byte_level(fields: Mapping[str, Any], used: dict[str, int], path: Path) -> tokenizers.Tokenizer:
    known, name = _known(), fields.get(f"{_PREFIX}pre")
    if name not in known:
        raise UsageError(f"{path}: {_PREFIX}pre is {name!r}; what can be imported: {', '.join(known)}.")
    pre = known[name]
    merges = [tuple(merge.split(" ")) for merge in fields[f"{_PREFIX}merges"]]
    fast = tokenizers.Tokenizer(models.BPE(vocab=used, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        fast.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(pre.split), "isolated") if pre.split else pre_tokenizers.Digits(True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None)
    fast.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    fast.decoder = decoders.ByteLevel()
    return fast


def _sentencepiece(fields: Mapping[str, Any], used: dict[str, int]) -> tokenizers.Tokenizer:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    scores = fields[f"{_PREFIX}scores"]
    merges = generate_merges(used, {token: scores[number] for token, number in used.items()})
    prefix = fields.get(f"{_PREFIX}add_space_prefix", True)
    made: tokenizers.Tokenizer = LlamaTokenizer(vocab=used, merges=merges, add_prefix_space=prefix).backend_tokenizer
    return made
