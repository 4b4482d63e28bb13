"""A conversation: messages with roles, texts, pictures, tool calls and their results.

    [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]

`content` is a text or a list of parts, in the layout of OpenAI's API: {"type": "text", "text": ...},
{"type": "image_url", "image_url": {"url": ...}}; in data also {"type": "image", "image": a path or bytes}."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.images import from_base64
from openm6.tasks.chat import ROLES
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots import image
from openm6.tasks.slots.text import from_json, spoken
from openm6.tasks.turns import Turn

KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a message that a template reads besides `role` and `content`."""


def schema() -> dict[str, Any]:
    content = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
    message = {
        "type": "object", "required": ["role"],
        "properties": {"role": {"enum": list(ROLES)}, "content": content},
    }  # fmt: skip
    return {"type": "array", "items": message, "minItems": 1}


def turns(value: Any, processor: Processor) -> list[Turn]:
    """Encode messages. Raises DataError, with the number of the message, for one that cannot be used."""
    found = []
    for number, message in enumerate(as_messages(value), 1):
        try:
            pieces = [_piece(part, processor) for part in _parts(message.get("content"))]
        except DataError as error:
            raise DataError(f"message {number} {error}") from None
        more = {key: message[key] for key in KEPT if message.get(key)}
        if not pieces and "tool_calls" not in more:
            raise DataError(f"message {number} is empty.")
        found.append(Turn(message["role"], pieces, more))
    return found


def source(value: Any, processor: Processor) -> NoReturn:
    raise UsageError("messages stand alone on the left side.")


def target(value: Any, processor: Processor) -> NoReturn:
    raise UsageError("messages are given to a model, and not written by it.")


def read(ids: Sequence[int], processor: Processor) -> NoReturn:
    raise UsageError("messages are given to a model, and not written by it.")


def as_messages(value: Any) -> list[Mapping[str, Any]]:
    """A value as messages, with roles in their order. Raises DataError for any other value."""
    value = from_json(value, "is a text, but not the JSON of messages.")
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        raise DataError('has to be messages: [{"role": "user", "content": "..."}, ...].')
    for number, message in enumerate(value, 1):
        role = message.get("role")
        if role not in ROLES:
            known = suggest(role, ROLES) if isinstance(role, str) else ""
            raise DataError(f"message {number} has the role {cut(repr(role))}; there are: {', '.join(ROLES)}.{known}")
        if role == "system" and number > 1:
            raise DataError(f"message {number} is a system text; it can only be the first.")
    return list(value)


def text_of(message: Mapping[str, Any]) -> str:
    """All texts of a message."""
    return "".join(part for part in _parts(message.get("content")) if isinstance(part, str))


def texts_of(value: Any) -> Iterator[str]:
    """The texts of all messages of a value; nothing for other values."""
    try:
        yield from map(text_of, as_messages(value))
    except DataError:
        return


def _piece(part: Any, processor: Processor) -> Piece:
    if isinstance(part, str):
        return spoken(part, processor, cuttable=False)
    return image.source(part["image"], processor)


def _parts(content: Any) -> list[Any]:
    """The parts of a message: texts, and pictures as {"image": value}."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise DataError(f"has a content that is neither a text nor a list of parts, but {type(content).__name__}.")
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if isinstance(part, Mapping):
        match part.get("type"), part:
            case "text", {"text": str(text)}:
                return text
            case "image_url", {"image_url": {"url": str(url)} | str(url)}:
                return {"image": from_base64(url) if url.startswith("data:") else url}
            case "image", {"image": value}:
                return {"image": value}
    raise DataError(
        'has a part that is neither {"type": "text", "text": "..."} nor {"type": "image_url", "image_url": {"url": '
        f'"..."}}}}, but {cut(repr(part))}.'
    )
