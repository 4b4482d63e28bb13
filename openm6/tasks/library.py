"""Tasks: those of OpenM6 (`library/*.yaml`), and a user's own, as a YAML file or as one line of instruction.

A task file is checked key by key.

    description: 看图回答问题
    instructions:
      - "[image:photo] [text:question] -> [text:answer]"
    metrics: [accuracy]
    decode: {max_new_tokens: 16}
    example: {photo: photo.jpg, question: "这件商品是什么颜色?", answer: 红色}

`instruction` with one line replaces `instructions` with one entry; the default name is that of the file."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from openm6.core.errors import UsageError, suggest
from openm6.tasks.grammar import half_width, parse
from openm6.tasks.metrics import ELSEWHERE, METRICS
from openm6.tasks.task import Task

Label = Annotated[str, Field(coerce_numbers_to_str=True)]
"""A label; YAML reads 7 as a number, and `yes`, which is refused, as a truth value."""


class TaskFile(BaseModel):
    """The keys of a task file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    description: str = ""
    instructions: list[str] = Field(min_length=1)
    metrics: list[str] = []
    decode: dict[str, int | float] = {}
    labels: dict[str, list[Label]] = {}
    example: dict[str, Any] = {}
    aliases: dict[str, list[str]] = {}
    reader: str = ""
    sketch: str = ""
    system: str = ""

    @field_validator("example")
    @classmethod
    def _example_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse a value such as 2024-01-01, which YAML reads as a date: a task is stored as JSON."""
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError("a value is no text, number, list or mapping: put it in quotes") from None
        return value


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
        tuples = {
            key: {name: tuple(some) for name, some in getattr(file, key).items()} for key in ("labels", "aliases")
        }
        instructions = tuple(map(parse, file.instructions))
        task = Task(**{**dict(file), **tuples, "instructions": instructions, "metrics": tuple(file.metrics)})
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


_FOLDER = Path(__file__).parent / "library"


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def names() -> list[str]:
    """Names of the library's tasks in alphabetical order."""
    return list(_files())


def get(name: str | Path) -> Task:
    """A task by its name, by the path of a YAML file, or by its instruction (`"[image] 是什么? -> [text]"`). Raises
    UsageError, with a suggestion, when there is none."""
    text = str(name)
    if text in _files():
        return _library_task(text)
    if "->" in text:
        return Task.from_instruction(text)
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return read_task(text)
    raise UsageError(
        f'There is no task "{text}".{suggest(text, names())} `openm6 tasks` lists them; '
        "a task of your own is given by the path of its YAML file."
    )


@lru_cache(maxsize=256)
def _library_task(name: str) -> Task:
    return read_task(_files()[name])
