"""The tokenizer that the metadata of a GGUF file describe (`tokenizer.ggml.*`), and the metadata of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from openm6.core.errors import OpenM6Error, UsageError

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Values of `token_type`."""
_SPECIAL = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
"""Special tokens: KEY of `tokenizer.ggml.KEY_token_id`, and that of transformers' KEY_token."""
_TEMPLATE = "tokenizer.chat_template"
_CHECKED = (
    "The cat's 12 cats' 3.14 10000\n\n  \t sat; WE'LL see!!! x=y+1 http://a.b/c_d\r\n"
    "猫坐在垫子上，今天12345。 e\u0301te\u0301 na\u00efve \u00a0 \U0001f63a\u200d\U0001f680 "
    "\u0e01\u0e34\u0e19 \u043a\u043e\u0442 <|im_end|>"
)
"""A text that known ways of cutting texts cut into different pieces."""


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
        if fields.get(f"{_PREFIX}add_bos_token") and (bos := special_tokens(fields)[1].get("bos_token")):
            fast.post_processor = processors.TemplateProcessing(
                f"{bos} $A", f"{bos} $A $B", [(bos, fast.token_to_id(bos))]
            )
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


def special_tokens(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ids of special tokens as transformers' config.json has them, and their names, with the chat template, as
    tokenizer_config.json has them."""
    tokens, ids, names = fields.get(f"{_PREFIX}tokens"), {}, {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, theirs in _SPECIAL.items():
        number = fields.get(f"{_PREFIX}{key}_token_id")
        known = isinstance(tokens, list) and type(number) is int and 0 <= number < len(tokens)
        if theirs != "unk":
            ids[f"{theirs}_token_id"] = number if known else None
        if known:
            names[f"{theirs}_token"] = tokens[number]  # type: ignore[index]
    if isinstance(template := fields.get(_TEMPLATE), str):
        names["chat_template"] = template
    return ids, names


def gguf_fields(fast: tokenizers.Tokenizer, names: Mapping[str, Any], size: int, source: Path) -> dict[str, Any]:
    """The metadata of a tokenizer with `size` ids, of whose tokenizer_config.json `names` are. Raises UsageError where
    GGUF has no name for how it cuts texts."""
    content = json.loads(fast.to_str())
    model, added = content["model"], {token["id"]: token["special"] for token in content["added_tokens"]}
    known = {number: token for token, number in fast.get_vocab(with_added_tokens=True).items()}
    pieces = bool(model.get("byte_fallback"))  # SentencePiece's
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]

    def kind(number: int) -> int:
        token = known.get(number)
        if token is None:
            return _UNUSED
        if pieces and token in (model.get("unk_token"), _name(names.get("unk_token"))):
            return _UNKNOWN
        if number in added:
            return _CONTROL if added[number] else _OWN
        return _BYTE if pieces and token.startswith("<0x") and len(token) == 6 else _NORMAL

    fields: dict[str, Any] = {
        f"{_PREFIX}tokens": [known.get(number, f"[PAD{number}]") for number in range(size)],
        f"{_PREFIX}token_type": [kind(number) for number in range(size)],
    }
    for key, theirs in _SPECIAL.items():
        name = _name(names.get(f"{theirs}_token"))
        if name and (number := fast.token_to_id(name)) is not None:
            fields[f"{_PREFIX}{key}_token_id"] = number
    bos = fields.get(f"{_PREFIX}bos_token_id")
    fields[f"{_PREFIX}add_bos_token"] = bos is not None and fast.encode("a").ids[:1] == [bos]
    if pieces:
        ranks = dict(reversed([("".join(merge), rank) for rank, merge in enumerate(merges)]))
        last = -float(len(merges))
        scores = [-float(ranks.get(known.get(n, ""), -last)) if kind(n) == _NORMAL else 0.0 for n in range(size)]
        made = fields | {f"{_PREFIX}model": "llama", f"{_PREFIX}scores": scores}
        ways = [made | {f"{_PREFIX}add_space_prefix": prefix} for prefix in (True, False)]
    else:
        made = fields | {f"{_PREFIX}model": "gpt2", f"{_PREFIX}merges": [" ".join(merge) for merge in merges]}
        ways = [made | {f"{_PREFIX}pre": pre} for pre in _known()]
    expected, alike = fast.encode(_CHECKED, add_special_tokens=False).ids, []
    for way in ways if model["type"] == "BPE" else ():
        rebuilt = gguf_tokenizer(way, source)
        if rebuilt.encode(_CHECKED, add_special_tokens=False).ids == expected:
            alike.append((_cutting(json.loads(rebuilt.to_str())) != _cutting(content), way))
    if alike:  # a small vocabulary has the same ids by several
        return min(alike, key=lambda one: one[0])[1]
    raise UsageError(f"{source}: GGUF has no name for how its tokenizer cuts texts ({', '.join(_known())}, llama).")


def _name(token: Any) -> str | None:
    """A special token of a tokenizer_config.json: its name, or an object with it."""
    return token.get("content") if isinstance(token, dict) else token


def _cutting(content: Mapping[str, Any]) -> list[Any]:
    """What a tokenizer.json says of cutting texts, as far as it makes a difference."""
    before = content["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    return [content["normalizer"], *((part.get("type"), part.get("pattern")) for part in parts)]
