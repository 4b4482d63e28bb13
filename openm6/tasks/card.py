"""openm6.json of a model directory, or of a package: how records become sequences, and the tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openm6.errors import OpenM6Error, UsageError
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

NAME = "openm6.json"


def write_card(path: Path, processor: Processor, tasks: Iterable[Task]) -> None:
    content: dict[str, Any] = {"max_length": processor.max_length, "tasks": [task.to_dict() for task in tasks]}
    if processor.prompt:
        content["prompt"] = processor.prompt
    (path / NAME).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")


def read_card(path: Path) -> tuple[list[Task], int, int]:
    """Of a directory's openm6.json: the tasks, the longest example, and the positions of a prompt."""
    card = path / NAME
    if not card.is_file():
        raise UsageError(
            f"{path} is no OpenM6 model: it has no openm6.json. `openm6 train` and `openm6 models import` make one."
        )
    try:
        content = json.loads(card.read_text("utf-8"))
        tasks = [Task.from_dict(d) for d in content["tasks"]]
        return tasks, int(content["max_length"]), int(content.get("prompt", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise OpenM6Error(f"{card} is damaged ({type(error).__name__}).") from None
