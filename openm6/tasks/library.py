"""The tasks of OpenM6 (`library/*.yaml`), and a user's own by path or as one line of instruction."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from openm6.core.errors import UsageError, suggest
from openm6.tasks.file import read_task
from openm6.tasks.task import Task

_FOLDER = Path(__file__).parent / "library"


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def names() -> list[str]:
    """Names of the library's tasks in alphabetical order."""
    return list(_files())


def get(name: str | Path) -> Task:
    """A task by its name, by the path of a YAML file, or by its instruction (`"[image] 是什么? -> [text]"`).

    Raises UsageError, with a suggestion, when there is none.
    """
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
