"""Task files: YAML checked key by key.

    description: 看图回答问题
    instructions:
      - "[image:photo] [text:question] -> [text:answer]"
    metrics: [accuracy]
    decode: {max_new_tokens: 16}
    example: {photo: photo.jpg, question: "这件商品是什么颜色?", answer: 红色}

`instruction` with one line replaces `instructions` with one entry; the default name is that of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from openm6.core.errors import UsageError, suggest
from openm6.tasks.grammar import half_width, parse
from openm6.tasks.metrics import ELSEWHERE, METRICS
from openm6.tasks.task import Task


class TaskFile(BaseModel):
    """The keys of a task file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    description: str = ""
    instructions: list[str] = Field(min_length=1)
    metrics: list[str] = []
    decode: dict[str, int | float] = {}
    labels: dict[str, list[str]] = {}
    example: dict[str, Any] = {}
    aliases: dict[str, list[str]] = {}
    reader: str = ""
    sketch: str = ""

    @field_validator("example")
    @classmethod
    def _example_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse a value such as 2024-01-01, which YAML reads as a date: a task is stored as JSON."""
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError("a value is no text, number, list or mapping: put it in quotes") from None
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        """Turn numbers back into texts: YAML reads 7 as a number. A truth value, as of `yes`, stays for validation to
        refuse."""
        if not isinstance(value, dict):
            return value
        return {
            name: [str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in labels]
            if isinstance(labels, list)
            else labels
            for name, labels in value.items()
        }


def read_task(path: str | Path) -> Task:
    """The task of a YAML file, by default named as the file. Raises UsageError."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"The task file {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UsageError(f"The task file {path} is no UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UsageError(f"{path}{line} is no YAML: {problem}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} has to hold keys such as `instructions`, not {type(content).__name__}.")
    for key in content.keys() & {"instruction", "instructions"}:
        lines = content[key] if isinstance(content[key], list) else [content[key]]
        lines = [half_width(line) if isinstance(line, str) else line for line in lines]
        content[key] = lines if isinstance(content[key], list) else lines[0]
    return task_from_dict({"name": path.stem, **content}, str(path))


def task_from_dict(content: Mapping[str, Any], where: str = "The task") -> Task:
    """The task with the keys of a file or of `Task.to_dict`. Raises UsageError that names `where` and the key."""
    keys = dict(content)
    if "instruction" in keys and "instructions" not in keys:
        keys["instructions"] = [keys.pop("instruction")]
    try:
        file = TaskFile.model_validate(keys)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first(error)}") from None
    for metric in file.metrics:
        if metric not in (*METRICS, *ELSEWHERE):
            hint = f"{suggest(metric, set(METRICS))} There are: {', '.join((*METRICS, *ELSEWHERE))}."
            raise UsageError(f"{where}: metrics: there is no {metric}.{hint}")
    try:
        task = Task(
            file.name,
            tuple(parse(text) for text in file.instructions),
            file.description,
            tuple(file.metrics),
            file.decode,
            {name: tuple(values) for name, values in file.labels.items()},
            file.example,
            {name: tuple(values) for name, values in file.aliases.items()},
            file.reader,
            file.sketch,
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    for key in ("example", "aliases"):
        for name in getattr(task, key):
            if name not in task.slots:
                hint = f"{suggest(name, list(task.slots))} It has: {', '.join(task.slots)}."
                raise UsageError(f"{where}: {key}.{name}: the task has no such slot.{hint}")
    return task


def _first(error: ValidationError) -> str:
    """The first of the validation errors, in our words."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(TaskFile.model_fields)
        return f"there is no key {key}.{suggest(key, known)} There are: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"the key {key} is missing."
    return f"{key}: {problem['msg']}, not {str(problem['input'])[:60]!r}."
