"""What clients of OpenAI's API ask for, answered by tasks.

A model is named `NAME`, or `NAME:TASK` for a task of one's own choice. A chat is answered by the task for pictures when
its last question has one (vqa), else by the one for texts; what was said before stands before the question.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import StreamingResponse
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field

from openm6.errors import DataError, UsageError
from openm6.images import open_image, png
from openm6.serve.fleet import Deployment
from openm6.serve.guard import known, sse
from openm6.serve.keys import Key
from openm6.serve.meter import Charge
from openm6.serve.server import AT_ONCE, Server, TaskRequest, asker

CHAT, LOOK, PAINT, EDIT, EMBED = "question_answering", "vqa", "text_to_image", "text_to_image", "text_vector"
"""Tasks that answer where none is named."""


class _Asked(BaseModel):
    """Fields that are not known are let be: clients send many."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Asked):
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=65_536)
    max_completion_tokens: int | None = Field(None, ge=1, le=65_536)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None


class ImageRequest(_Asked):
    prompt: str = Field(min_length=1, max_length=4_000)
    n: int = Field(1, ge=1, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    response_format: Literal["b64_json"] | None = None


class EmbeddingRequest(_Asked):
    input: str | list[str] = Field(min_length=1)
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"


def add_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(
        asked: ChatRequest, request: Request, key: Annotated[Key, asker()]
    ) -> dict[str, Any] | StreamingResponse:
        """A conversation goes on."""
        text, picture = _conversation(asked.messages)
        deployment, task = _chosen(server, asked.model, LOOK if picture is not None else CHAT)
        inputs = _by_type(server, deployment, task, text, picture)
        decoding = {
            "max_new_tokens": asked.max_completion_tokens or asked.max_tokens, "temperature": asked.temperature,
            "top_p": asked.top_p,
        }  # fmt: skip
        given = {name: value for name, value in decoding.items() if value is not None}
        messages = []
        for number in range(asked.n):
            one = TaskRequest(inputs=inputs, decoding={**given, "seed": (asked.seed or 0) + number})
            messages.append(await server.message(deployment, task, one))
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model or deployment.name,
        }
        if asked.stream:
            usage = bool((asked.stream_options or {}).get("include_usage"))
            return await sse(_chunks(server, key, deployment, messages, stops, about, usage), "[DONE]")
        charge = Charge(server.meter, key)
        found = await asyncio.gather(*(_text(server, charge, deployment, one, stops, request) for one in messages))
        choices = [
            {"index": i, "message": {"role": "assistant", "content": said}, "finish_reason": reason, "logprobs": None}
            for i, (said, reason) in enumerate(found)
        ]
        return {**about, "object": "chat.completion", "choices": choices, "usage": _usage(charge)}

    @app.post("/v1/images/generations")
    async def generations(asked: ImageRequest, request: Request, key: Annotated[Key, asker()]) -> dict[str, Any]:
        """Pictures for a text, the best first."""
        deployment, task = _chosen(server, asked.model, PAINT)
        inputs = _by_type(server, deployment, task, asked.prompt, None)
        one = TaskRequest(inputs=inputs, candidates=asked.n, decoding={"seed": asked.seed or 0})
        return await _pictures(server, key, deployment, await server.message(deployment, task, one), request)

    @app.post("/v1/images/edits")
    async def edits(
        request: Request,
        key: Annotated[Key, asker()],
        image: Annotated[UploadFile, File()],
        prompt: Annotated[str, Form(min_length=1, max_length=4_000)],
        mask: Annotated[UploadFile | None, File()] = None,
        model: Annotated[str | None, Form()] = None,
        n: Annotated[int, Form(ge=1, le=10)] = 1,
    ) -> dict[str, Any]:
        """A picture redrawn where the mask is transparent (or white, of one without transparency), after a text."""
        deployment, task = _chosen(server, model, EDIT)
        inputs = _by_type(server, deployment, task, prompt, None)
        message = await server.message(deployment, task, TaskRequest(inputs=inputs, candidates=n))
        given = await image.read()
        message["edit"] = await asyncio.to_thread(_edit_of, given, await mask.read() if mask else given)
        return await _pictures(server, key, deployment, message, request)

    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest, key: Annotated[Key, asker()]) -> dict[str, Any]:
        """Vectors of texts."""
        deployment, task = _chosen(server, asked.model, EMBED)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if len(texts) > 2048:
            raise UsageError("At most 2048 texts at once.")
        decoding = {"dims": asked.dimensions} if asked.dimensions else {}

        turn = asyncio.Semaphore(AT_ONCE)

        async def one(text: str) -> dict[str, Any]:
            inputs = _by_type(server, deployment, task, text, None)
            message = await server.message(deployment, task, TaskRequest(inputs=inputs, decoding=decoding))
            async with turn:
                return await server.in_turn(key, deployment, message)

        found = await asyncio.gather(*map(one, texts))
        vectors = [answer["value"] for answer in found]
        coded = [v if asked.encoding_format == "float" else _base64(v) for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(coded)]
        count = sum(answer["prompt_tokens"] for answer in found)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": asked.model or deployment.name, "usage": usage}


def _chosen(server: Server, model: str | None, task: str) -> tuple[Deployment, str]:
    name, _, own = (model or "").partition(":")
    deployment = known(server.fleet.get, name or None, "model_not_found")
    known(partial(server.task, deployment), own or task, "model_not_found")
    return deployment, own or task


def _conversation(messages: list[Message]) -> tuple[str, Any]:
    """All texts, the question last, and the last picture."""
    texts, picture = [], None
    for message in messages:
        parts = message.content if isinstance(message.content, list) else [{"type": "text", "text": message.content}]
        for part in parts:
            if part.get("type") == "text" and part.get("text"):
                texts.append(str(part["text"]))
            elif part.get("type") == "image_url":
                picture = part.get("image_url")
            elif part.get("type") != "text":
                raise UsageError(f"A part of a message is text or image_url, not {part.get('type')}.")
    return "\n".join(texts), picture


def _by_type(server: Server, deployment: Deployment, task: str, text: str, picture: Any) -> dict[str, Any]:
    """The text in the task's text slot, the picture in its slot for one."""
    told = server.task(deployment, task)
    slots = {name: told["slots"][name] for name in told["inputs"]}
    wanted = [name for name, kind in slots.items() if kind == "text"]
    seen = [name for name, kind in slots.items() if kind == "image"]
    if len(wanted) != 1 or (picture is not None and len(seen) != 1):
        raise UsageError(f"The task {task} takes {', '.join(slots)}: ask it by /v1/tasks/{task}.")
    return {wanted[0]: text, **({seen[0]: picture} if picture is not None else {})}


def _edit_of(picture: bytes, mask: bytes) -> dict[str, bytes]:
    """Picture and mask as they are worked with: white is redrawn. Raises DataError where nothing is masked."""
    shape = open_image(mask, alpha=True)
    if shape.mode == "RGBA":
        if mask is picture:  # what is under a transparent place is part of the picture
            picture = png(shape.convert("RGB"))
        shape = ImageOps.invert(shape.getchannel("A"))
    elif mask is picture:
        raise DataError("A mask is needed, or a picture that is transparent where it is to be redrawn.")
    return {"picture": picture, "mask": png(shape.convert("L"))}


async def _text(
    server: Server, charge: Charge, deployment: Deployment, message: Mapping[str, Any], stops: list[str],
    request: Request,
) -> tuple[str, str]:  # fmt: skip
    found = await server.whole(charge.key, deployment, message, request, charge)
    said = found["value"] if isinstance(found["value"], str) else str(found["value"])
    cut = min((place for stop in stops if (place := said.find(stop)) >= 0), default=-1)
    reason = "stop" if found["finished"] or cut >= 0 else "length"
    return said if cut < 0 else said[:cut], reason


def _usage(charge: Charge) -> dict[str, int]:
    """What is charged; the prompt counts once, as in OpenAI's own."""
    prompt, written = charge.prompt_tokens, charge.tokens
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def _chunks(
    server: Server, key: Key, deployment: Deployment, messages: list[dict[str, Any]], stops: list[str],
    about: Mapping[str, Any], usage: bool,
) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
    """Of one answer after the other."""

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**about, "object": "chat.completion.chunk", "choices": [choice]}

    charge = Charge(server.meter, key)
    for index, message in enumerate(messages):
        said, told, reason, begun = "", "", None, False
        async with aclosing(server.answer(key, deployment, message, charge)) as events:
            async for event in events:
                said += event.get("piece", "")
                value = event.get("value")
                if "value" in event:
                    reason = "stop" if event["finished"] else "length"
                    if not said:  # labels and numbers come at once
                        said = value if isinstance(value, str) else str(value)
                cut = min((place for stop in stops if (place := said.find(stop)) >= 0), default=-1)
                # What may be the beginning of a stop waits.
                kept = len(said) if reason or not stops else max(len(told), len(said) - max(map(len, stops)) + 1)
                safe = said[:cut] if cut >= 0 else said[:kept]
                if not begun:
                    yield chunk(index, {"role": "assistant", "content": ""})
                    begun = True
                if len(safe) > len(told):
                    yield chunk(index, {"content": safe[len(told) :]})
                    told = safe
                if cut >= 0:
                    reason = "stop"
                    break
        yield chunk(index, {}, reason)
    if usage:
        yield {**about, "object": "chat.completion.chunk", "choices": [], "usage": _usage(charge)}


async def _pictures(
    server: Server, key: Key, deployment: Deployment, message: Mapping[str, Any], request: Request
) -> dict[str, Any]:
    found = await server.whole(key, deployment, message, request)
    data = [{"b64_json": base64.b64encode(one["image"]).decode()} for one in found["value"]]
    read, drawn = found["prompt_tokens"], found["tokens"]
    usage = {"input_tokens": read, "output_tokens": drawn, "total_tokens": read + drawn}
    return {"created": int(time.time()), "data": data, "usage": usage}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
