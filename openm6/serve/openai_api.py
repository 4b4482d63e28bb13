"""Routes of OpenAI's API, answered by tasks.

A model is named `NAME`, or `NAME:TASK` to choose a task. A chat is answered by the task chat, which keeps roles, turns
and all pictures, where the model was trained on it, as imported chat models are. Another model answers a chat with
pictures by the task vqa, one without by question_answering, or by its only trained task with as many pictures and
texts; earlier messages then precede the question."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from fastapi import FastAPI, Form, Request
from fastapi.responses import StreamingResponse

from openm6.core.errors import UsageError, cut
from openm6.core.files import dumps
from openm6.inference.edit import COVERS_ALL
from openm6.serve.fleet import Deployment
from openm6.serve.guard import sse, unless_gone
from openm6.serve.incoming import cut_for, put_back, sent
from openm6.serve.meter import Charge
from openm6.serve.openai_requests import Asked, ChatRequest, EditRequest, EmbeddingRequest, ImageRequest, Message
from openm6.serve.server import AT_ONCE, Server, User, is_trained, left_out, reasoning_of, samples

T = TypeVar("T")

CONVERSE, CHAT, LOOK = "chat", "question_answering", "vqa"
PAINT, EDIT, EMBED = "text_to_image", "text_to_image", "text_vector"
"""Default tasks."""

WRITTEN, DRAWN, VECTORS = ("text", "value"), ("picture",), ("vector",)
"""Kinds of tasks (worker.described) that answer chats, image requests and embeddings."""


class _Chosen(NamedTuple):
    """The task that answers: its description (worker.described), its inputs, and the model's name in the answer."""

    deployment: Deployment
    task: str
    told: Mapping[str, Any]
    inputs: dict[str, Any]
    model: str


def add_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request, key: User) -> dict[str, Any] | StreamingResponse:
        """Continue a conversation."""
        text, pictures = _conversation(asked.messages)
        usual, messages = LOOK if pictures else CHAT, _messages(asked.messages)
        if converses(server.fleet.get((asked.model or "").partition(":")[0] or None), asked.adapter):
            usual = CONVERSE
        chosen = _chosen(server, asked, request, usual, WRITTEN, text, pictures, messages)
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        one = asked.task_request(
            inputs=chosen.inputs, decoding=asked.decoding(), stop=stop, thinking=asked.enable_thinking
        )
        messages = _several(await server.message(chosen.deployment, chosen.task, one), asked.n, chosen)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chosen.model}
        charge = Charge(server.meter, key)
        if asked.stream:
            usage = asked.stream_options.include_usage
            return await sse(_chunks(server, charge, chosen, messages, about, usage), "[DONE]", request)
        found = await _all(server.whole(charge, chosen.deployment, message, request) for message in messages)
        choices = [
            {
                "index": index, "message": {"role": "assistant", "content": _said(one["value"]), **_reasoning(one)},
                "finish_reason": "stop" if one["finished"] else "length", "logprobs": None,
                **_told_beside(message, one),
            }
            for index, (one, message) in enumerate(zip(found, messages, strict=True))
        ]  # fmt: skip
        return {**about, "object": "chat.completion", "choices": choices, "usage": _usage(charge)}

    @app.post("/v1/images/generations")
    async def generations(asked: ImageRequest, request: Request, key: User) -> dict[str, Any]:
        """Draw pictures for a text, the best first."""
        deployment, message = await _drawing(server, asked, request, PAINT)
        side = deployment.about["picture"]
        _check_size(asked, (side, side))
        return _pictures(message, await server.whole(Charge(server.meter, key), deployment, message, request))

    @app.post("/v1/images/edits")
    async def edits(asked: Annotated[EditRequest, Form()], request: Request, key: User) -> dict[str, Any]:
        """Redraw a picture after a text where its mask is transparent (or white, if it has no alpha channel)."""
        names = Counter(name for name, _ in (await request.form()).multi_items())
        if twice := next((name for name, count in names.items() if count > 1), ""):
            raise UsageError(f"{cut(twice)} was sent {names[twice]} times: send it once.", param=cut(twice))
        deployment, message = await _drawing(server, asked, request, EDIT)
        mask = await asked.mask.read() if asked.mask else None
        region = await asyncio.to_thread(cut_for, deployment, await asked.image.read(), mask)
        _check_size(asked, region.picture.size)
        charge, message = Charge(server.meter, key), {**message, "edit": sent(region)}
        found = await server.whole(charge, deployment, message, request)
        found["value"] = await asyncio.to_thread(put_back, region, found["value"])
        return {**_pictures(message, found), **({"warning": COVERS_ALL} if region.covers_all else {})}

    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest, request: Request, key: User) -> dict[str, Any]:
        """Embed texts."""
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if len(texts) > 2048:
            raise UsageError("At most 2048 texts at once.", param="input")
        decoding = {"dims": asked.dimensions} if asked.dimensions else {}
        chosen = _chosen(server, asked, request, EMBED, VECTORS, texts[0], [])
        every = [_filled(chosen.task, chosen.told, text, [], asked.source) for text in texts]

        turn = asyncio.Semaphore(AT_ONCE)

        async def one(inputs: dict[str, Any]) -> dict[str, Any]:
            wanted = asked.task_request(inputs=inputs, decoding=decoding)
            message = await server.message(chosen.deployment, chosen.task, wanted)
            async with turn:
                return await server.in_turn(key, chosen.deployment, message)

        found = await unless_gone(request, _all(map(one, every)))
        vectors = [answer["value"] for answer in found]
        if asked.encoding_format == "base64":
            vectors = [base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode() for vector in vectors]
        data = [
            {"object": "embedding", "index": i, "embedding": vector, **left_out(answer)}
            for i, (vector, answer) in enumerate(zip(vectors, found, strict=True))
        ]
        count = sum(answer["prompt_tokens"] for answer in found)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": chosen.model, "usage": usage}


def _chosen(
    server: Server, asked: Asked, request: Request, usual: str, kinds: Sequence[str], text: str,
    pictures: Sequence[Any], messages: Sequence[Any] = (),
) -> _Chosen:  # fmt: skip
    """The named task, else the default; where that does not fit, or the model was not trained on it, the only trained
    one that fits. Errors then name the fields of the request. Raises UsageError where the task does not fit, or there
    is none."""
    name, _, own = (asked.model or "").partition(":")
    deployment = server.fleet.get(name or None)
    tasks = deployment.about["tasks"]

    def inputs_of(task: str) -> dict[str, Any]:
        told = server.task(deployment, task, "model_not_found")
        if told["kind"] not in kinds:
            message = f"The task {task} gives a {told['kind']}: ask it at /v1/tasks/{task}."
            raise UsageError(message, code="wrong_task", param="model")
        return _filled(task, told, text, pictures, asked.source, messages)

    def fits(task: str) -> bool:
        try:
            return is_trained(tasks[task], asked.adapter) and inputs_of(task) is not None
        except (KeyError, UsageError):
            return False

    task, model = own or usual, asked.model or deployment.name
    if not own and not fits(usual) and len(fitting := [one for one in tasks if fits(one)]) == 1:
        task = fitting[0]
        model = f"{deployment.name}:{task}"
    inputs = inputs_of(task)
    request.state.fields = {**dict.fromkeys(inputs, asked.source), **asked.fields_of_options()}
    return _Chosen(deployment, task, tasks.get(task, {}), inputs, model)


def _filled(
    task: str, told: Mapping[str, Any], text: str, pictures: Sequence[Any], source: str, messages: Sequence[Any] = ()
) -> dict[str, Any]:
    """The task's inputs: the messages in its slot of messages, else the text and the pictures, in their order, in all
    slots of their types or in the required ones. Raises UsageError where their number differs."""
    if messages and "messages" in told["slots"].values():
        return {next(slot for slot, kind in told["slots"].items() if kind == "messages"): list(messages)}
    inputs: dict[str, Any] = {}
    required = told["schema"]["inputs"]["required"]
    for kind, name, values in (("text", "text", [text] if text else []), ("image", "picture", pictures)):
        slots = [slot for slot in told["inputs"] if told["slots"][slot] == kind]
        needed = [slot for slot in slots if slot in required]
        if len(values) not in (len(slots), len(needed)):
            takes = f"{len(slots)} {name}{'s' * (len(slots) > 1)} ({', '.join(slots)})" if slots else f"no {name}"
            raise UsageError(
                f"The task {task} takes {takes}, and {source} has {len(values)}.", code="wrong_inputs", param=source
            )
        inputs |= zip(slots if len(values) == len(slots) else needed, values, strict=True)
    if set(required) - set(inputs):
        message = f"The task {task} takes {', '.join(told['inputs'])}: ask it at /v1/tasks/{task}."
        raise UsageError(message, code="wrong_task", param="model")
    return inputs


def _conversation(messages: list[Message]) -> tuple[str, list[Any]]:
    """All texts, joined, and all pictures of a conversation, in their order."""
    texts, pictures = [], []
    for message in messages:
        parts = message.content if isinstance(message.content, list) else [{"type": "text", "text": message.content}]
        for part in parts:
            kind = part.get("type")
            value = part.get(kind) if kind in ("text", "image_url") else None
            if kind == "text" and (value is None or isinstance(value, str)):
                texts += [value] if value else []
            elif kind == "image_url" and value:
                pictures.append(value)
            else:
                raise UsageError(
                    'A part of a message is {"type": "text", "text": "..."} or {"type": "image_url", "image_url": '
                    f'{{"url": "..."}}}}, not {cut(part)}.', param="messages",
                )  # fmt: skip
    return "\n".join(texts), pictures


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as values of a slot."""
    roles = {"developer": "system"}
    return [{"role": roles.get(one.role, one.role), "content": one.content} for one in messages]


def converses(deployment: Deployment, adapter: str | None) -> bool:
    """Whether the model, or this adapter of it, was trained on conversations."""
    task = deployment.about["tasks"].get(CONVERSE)
    return task is not None and is_trained(task, adapter)


def _reasoning(found: Mapping[str, Any]) -> dict[str, str]:
    return {"reasoning_content": found["reasoning"]} if reasoning_of(found) else {}


def _several(message: dict[str, Any], n: int, chosen: _Chosen) -> list[dict[str, Any]]:
    """The message n times, with different seeds. Raises UsageError where all answers would be equal."""
    if n == 1:
        return [message]
    decoding = message["decoding"]
    if not samples(chosen.told, decoding):
        raise UsageError(
            f"n is {n}, but all answers would be the same: the task {chosen.task} takes the likeliest one. Send a "
            "temperature above 0, or n = 1.", code="unsupported_value", param="n",
        )  # fmt: skip
    seeds = ((decoding["seed"] + number) % 2**63 for number in range(n))  # each can be sent again
    return [{**message, "decoding": {**decoding, "seed": seed}} for seed in seeds]


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all coroutines; the first failure cancels the others."""
    running = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()


async def side_by_side(streams: Iterable[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they arrive; the first failure ends the others."""
    items: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def follow(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait(item)
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    running = [asyncio.create_task(follow(stream)) for stream in streams]
    try:
        left = len(running)
        while left:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for one in running:
            one.cancel()
        await asyncio.wait(running)


def _said(value: Any) -> str:
    """An answer as text: a label or text itself; several outputs, numbers and boxes as JSON."""
    return value if isinstance(value, str) else dumps(value)


def _told_beside(message: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Additional fields of a choice: the seed, and the positions of the source that were left out, if any."""
    return {"seed": message["decoding"].get("seed"), **left_out(found)}


def _usage(charge: Charge) -> dict[str, int]:
    """The tokens that are charged; the prompt counts once, as with OpenAI."""
    prompt, written = charge.prompt_tokens, charge.tokens
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def _chunks(
    server: Server,
    charge: Charge,
    chosen: _Chosen,
    messages: list[dict[str, Any]],
    about: Mapping[str, Any],
    usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of all choices, interleaved."""
    about = {**about, "object": "chat.completion.chunk"}
    # Only an answer that is a single text is sent in pieces.
    pieces = [chosen.told["slots"][name] for name in chosen.told["outputs"]] == ["text"]

    async def one(index: int, message: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
            return {**about, "choices": [choice]}

        begun = said = False
        async with aclosing(server.answer(charge, chosen.deployment, {**message, "pieces": pieces})) as events:
            async for event in events:
                if not begun:
                    yield chunk({"role": "assistant", "content": ""})
                    begun = True
                piece = event.get("piece", "")
                if "value" not in event and event.get("reasoning"):
                    yield chunk(_reasoning(event))
                if "value" in event and not (said or piece):
                    piece = _said(event["value"])
                if piece:
                    yield chunk({"content": piece})
                    said = True
                if "value" in event:
                    reason = "stop" if event["finished"] else "length"
                    yield chunk({}, reason, **_told_beside(message, event))

    async with aclosing(side_by_side(one(*numbered) for numbered in enumerate(messages))) as chunks:
        async for each in chunks:
            yield each
    if usage:
        yield {**about, "choices": [], "usage": _usage(charge)}


async def _drawing(
    server: Server, asked: ImageRequest, request: Request, usual: str
) -> tuple[Deployment, dict[str, Any]]:
    """The model and the message of a request for pictures."""
    chosen = _chosen(server, asked, request, usual, DRAWN, asked.prompt, [])
    decoding = {} if asked.seed is None else {"seed": asked.seed}
    one = asked.task_request(inputs=chosen.inputs, candidates=asked.n, decoding=decoding)
    return chosen.deployment, await server.message(chosen.deployment, chosen.task, one)


def _check_size(asked: ImageRequest, size: tuple[int, int]) -> None:
    """Raises UsageError for another size than that of the model's pictures."""
    width, height = size
    if asked.size not in (None, "auto", f"{width}x{height}"):
        message = f"The pictures of this request have {width}x{height} pixels: leave size out."
        raise UsageError(message, code="unsupported_value", param="size")


def _pictures(message: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    data = [
        {"b64_json": base64.b64encode(one["image"]).decode(), "seed": one["seed"], "uncertain": one["uncertain"]}
        for one in found["value"]
    ]
    read, drawn = found["prompt_tokens"], found["tokens"]
    usage = {"input_tokens": read, "output_tokens": drawn, "total_tokens": read + drawn}
    return {"created": int(time.time()), "data": data, "seed": message["decoding"]["seed"], "usage": usage}
