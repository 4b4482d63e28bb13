"""openm6.json of a model directory or an ONNX bundle: how records become sequences, and the tasks; and beside it the
chat template of a model that is asked by one."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openm6.core.errors import OpenM6Error, UsageError, suggest_path
from openm6.core.files import require_format
from openm6.tasks.chat import TEMPLATE, ChatFormat
from openm6.tasks.grammar import parse, write
from openm6.tasks.library import task_from_dict
from openm6.tasks.processor import Processor
from openm6.tasks.sandbox import SOURCE_LIMIT
from openm6.tasks.task import Task

NAME = "openm6.json"
FORMAT = 2
"""Version of openm6.json; another one is refused, but for 1, whose instructions have no groups."""


def write_card(path: Path, processor: Processor, tasks: Iterable[Task]) -> None:
    content: dict[str, Any] = {
        "format": FORMAT, "max_length": processor.max_length, "tasks": [task.to_dict() for task in tasks],
    }  # fmt: skip
    if processor.prompt:
        content["prompt"] = processor.prompt
    if processor.seen_tokens is not None:
        content["seen_tokens"] = _ranges(processor.seen_tokens)
    if processor.origin:
        content["origin"] = processor.origin
    content["prompt_format"] = "chat" if processor.chat else "openm6"
    if processor.chat:
        content["chat"] = {
            "tokens": dict(processor.chat.tokens), "date": processor.chat.date, "thinking": processor.chat.thinking,
            "system": processor.chat.system, "sampling": dict(processor.chat.sampling),
        }  # fmt: skip
        (path / TEMPLATE).write_text(processor.chat.template, "utf-8")
    if processor.checkpoint:
        content["checkpoint"] = processor.checkpoint
    (path / NAME).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")


def read_seen_tokens(path: Path) -> frozenset[int] | None:
    """The ids that the model of a directory has met in training; None where the card has no such list."""
    card = path / NAME
    try:
        ranges = _content(card).get("seen_tokens")
        if ranges is None:
            return None
        spans = [span.partition("-") for span in ranges.split(",") if span]
        return frozenset(n for first, _, last in spans for n in range(int(first), int(last or first) + 1))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(card, error) from None


def read_origin(path: Path) -> dict[str, str] | None:
    """Name and licence of the checkpoint that the weights of a directory began with; None where no card says so."""
    card = path / NAME
    if not card.is_file():
        return None
    try:
        origin = _content(card).get("origin")
        return None if origin is None else {str(key): str(value) for key, value in origin.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(card, error) from None


def read_chat(path: Path) -> ChatFormat | None:
    """The chat form of a model directory; None for a model in OpenM6's own form."""
    card = path / NAME
    content = _content(card)
    kind = content.get("prompt_format", "openm6")
    if kind == "openm6":
        return None
    try:
        if kind == "chat":
            return ChatFormat(load_template(path), **content["chat"])
    except (KeyError, TypeError) as error:
        raise _damaged(card, error) from None
    raise OpenM6Error(f"{card} is damaged: its prompt_format is {kind!r}; there are openm6 and chat.")


def load_template(folder: Path) -> str:
    """The chat template of a directory. Raises OpenM6Error where it is missing, too large or no text."""
    file = folder / TEMPLATE
    try:
        if file.stat().st_size <= 4 * SOURCE_LIMIT:
            return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    raise OpenM6Error(
        f"{folder} is damaged: its {TEMPLATE} is missing, no text, or has over {4 * SOURCE_LIMIT:,} bytes."
    )


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What the card of a directory has of the configurations of the checkpoint that its weights began with."""
    card = path / NAME
    try:
        found = _content(card).get("checkpoint")
        return None if found is None else {str(key): dict(value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(card, error) from None


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: "0-11,15,20-21"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def read_card(path: Path) -> tuple[list[Task], int, int]:
    """The tasks of a directory's openm6.json, the maximum length of an example, and the number of prompt positions."""
    card = path / NAME
    if not path.exists():
        raise UsageError(f"{path} is no OpenM6 model: there is no such path.{suggest_path(path)}")
    if not card.is_file():
        raise UsageError(
            f"{path} is no OpenM6 model: it has no openm6.json. `openm6 train` and `openm6 models import` make one."
        )
    try:
        content = _content(card)
        if content["format"] == 1:
            for task in content["tasks"]:
                task["instructions"] = list(map(_from_format_1, task["instructions"]))
        tasks = [task_from_dict(d) for d in content["tasks"]]
        return tasks, int(content["max_length"]), int(content.get("prompt", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(card, error) from None


def _from_format_1(text: str) -> str:
    """An instruction of format 1, where a brace was a plain character, and no blank beside a slot part of a text."""
    found = parse(re.sub("[{}]", r"\g<0>\g<0>", text))
    bare = tuple(part.strip() if isinstance(part, str) else part for part in found.source)
    return found.text if bare == found.source else write(bare, found.target)


def _content(card: Path) -> dict[str, Any]:
    content = dict(json.loads(card.read_text("utf-8")))
    if content.get("format") != 1:
        require_format(card, content.get("format"), FORMAT)
    return content


def _damaged(card: Path, error: Exception) -> OpenM6Error:
    return OpenM6Error(f"{card} is damaged ({type(error).__name__}).")
