"""Request bodies of OpenAI's API: supported fields, and OpenAI's fields that are ignored or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import UploadFile
from pydantic import Field, field_validator

from openm6.core.errors import UsageError
from openm6.serve.bodies import ANY, AskingFields, Fields, Passing
from openm6.serve.server import TaskRequest

_EVERYWHERE: Mapping[str, Passing] = {
    "user": ANY, "metadata": ANY, "service_tier": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY,
    "prompt_cache_options": ANY, "prompt_cache_retention": ANY, "store": (False,),
}  # fmt: skip

DECODING = (
    "temperature", "top_p", "top_k", "seed", "num_beams", "length_penalty", "repetition_penalty",
    "no_repeat_ngram_size",
)  # fmt: skip
"""Fields of a chat that are decoding options of the same name."""


class Asked(AskingFields):
    """A request of OpenAI's API, with three fields of this server. `source` is the field with the texts and
    pictures."""

    source: ClassVar[str]

    def task_request(self, **more: Any) -> TaskRequest:
        own = {name: getattr(self, name) for name in ("adapter", "truncate", "allow_untrained")}
        return TaskRequest(**own, **more)

    def fields_of_options(self) -> dict[str, str]:
        """Decoding options by name, with the fields that stand for them."""
        return {}


class Message(Fields):
    others: ClassVar[Mapping[str, Passing]] = {
        "name": ANY, "refusal": ("",), "annotations": ANY, "audio": (), "tool_calls": ([],), "function_call": (),
        "tool_call_id": (),
    }  # fmt: skip
    prefix: ClassVar = "messages."

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(Fields):
    others: ClassVar[Mapping[str, Passing]] = {"include_obfuscation": ANY}
    prefix: ClassVar = "stream_options."

    include_usage: bool = False


class ChatRequest(Asked):
    others: ClassVar[Mapping[str, Passing]] = {
        **_EVERYWHERE, "moderation": (), "parallel_tool_calls": ANY, "tools": ([],), "functions": ([],),
        "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
        "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "frequency_penalty": (0,),
        "presence_penalty": (0,), "modalities": (["text"],), "audio": (), "prediction": (),
        "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (), "best_of": (1,), "echo": (False,),
        "suffix": ("",),
    }  # fmt: skip
    source: ClassVar = "messages"

    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=65_536)
    max_completion_tokens: int | None = Field(None, ge=1, le=65_536)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    num_beams: int | None = Field(None, ge=1, lt=2**31)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0, lt=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: str | Annotated[list[str], Field(max_length=64)] = Field(default_factory=list)
    enable_thinking: bool | None = Field(None, description="reason before the answer, where the model can")
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    def decoding(self) -> dict[str, int | float]:
        """Raises UsageError where the two names of one field disagree."""
        found = {name: value for name in DECODING if (value := getattr(self, name)) is not None}
        lengths = {length for length in (self.max_tokens, self.max_completion_tokens) if length is not None}
        if len(lengths) > 1:
            raise UsageError("max_tokens and max_completion_tokens differ: send one of them.", param="max_tokens")
        return {**found, "max_new_tokens": lengths.pop()} if lengths else found

    def fields_of_options(self) -> dict[str, str]:
        return {"max_new_tokens": "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"}


class ImageRequest(Asked):
    """Also the fields of a form, which are texts."""

    others: ClassVar[Mapping[str, Passing]] = {
        **_EVERYWHERE, "moderation": ANY, "quality": ("auto", "standard"), "style": (),
        "background": ("auto", "opaque"), "output_format": ("png",), "output_compression": (100, "100"),
        "partial_images": (0, "0"), "stream": (False, "false"), "response_format": ("b64_json",),
        "input_fidelity": (), "complexity": (), "frame_count": (), "frame_duration_ms": (), "markup": (), "svg": (),
        "image[]": (), "images": (),
    }  # fmt: skip
    source: ClassVar = "prompt"

    prompt: str = Field(min_length=1, max_length=4_000)
    n: int = Field(1, ge=1, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    size: str | None = None


class EditRequest(ImageRequest):
    image: UploadFile
    mask: UploadFile | None = None


class EmbeddingRequest(Asked):
    others: ClassVar = _EVERYWHERE
    source: ClassVar = "input"

    input: str | list[str] = Field(min_length=1)
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"

    def fields_of_options(self) -> dict[str, str]:
        return {"dims": "dimensions"}

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """Raises UsageError for token ids."""
        if isinstance(value, list) and value and isinstance(value[0], (int, list)):
            message = (
                "input has token ids, which are those of another tokenizer: send the texts. LangChain's "
                "OpenAIEmbeddings does so with check_embedding_ctx_length=False."
            )
            raise UsageError(message, code="unsupported_parameter", param="input")
        return value
