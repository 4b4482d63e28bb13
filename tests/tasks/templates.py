"""Chat templates of our own in the forms of open families, with their special tokens, and byte-level tokenizers."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from openm6.core.tokenizer import Tokenizer
from openm6.tasks.chat import ChatFormat


class Family(NamedTuple):
    """template: Jinja source; ends: the end tokens, the template's own first; special: all special tokens."""

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]


CHATML = Family(
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|im_end|>", "<|endoftext|>"),
)  # fmt: skip
REASONING = Family(  # leaves the reasoning of earlier answers out, as Qwen3's does
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|im_end|>", "<|endoftext|>"),
)  # fmt: skip
HEADERS = Family(  # trims, and writes a date, as Llama 3's does
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start|>system<|middle|>\\n\\nToday: ' + (date_string or strftime_now('%d %b %Y')) + '\\n\\n' }}"
    "{{ system + '<|eot|>' }}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '<|middle|>\\n\\n' + (m.content | trim) + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|middle|>\\n\\n' }}{% endif %}",
    ("<|begin|>", "<|start|>", "<|middle|>", "<|eot|>", "<|eom|>"), ("<|eot|>", "<|eom|>"),
)  # fmt: skip
BRACKETS = Family(  # no role for a system text, strict about the order of turns, as Mistral's and Gemma's
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles have to alternate.') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"), ("</s>",),
)  # fmt: skip
FAMILIES = {"chatml": CHATML, "reasoning": REASONING, "headers": HEADERS, "brackets": BRACKETS}

_TEXTS = [
    "the cat sat on the mat\n\n, the dog sat on the log\n",
    "今天天气很好，我们去公园\n",
    "\n\n  system user assistant",
]


@cache
def _vocabulary(special: tuple[str, ...]) -> str:
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator(_TEXTS * 3, trainer)
    fast.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return str(fast.to_str())


def fast_tokenizer(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(_vocabulary(FAMILIES[name].special))


def named_tokens(name: str) -> dict[str, str]:
    family = FAMILIES[name]
    return {"bos_token": family.special[0], "eos_token": family.ends[0]}


def ours(name: str, **settings: object) -> tuple[ChatFormat, Tokenizer]:
    family = FAMILIES[name]
    chat = ChatFormat(family.template, named_tokens(name), **settings)  # type: ignore[arg-type]
    return chat, Tokenizer.wrap(fast_tokenizer(name), num_codes=0, ends=family.ends)


def theirs(name: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer(name), **named_tokens(name))
    made.chat_template = FAMILIES[name].template
    return made
