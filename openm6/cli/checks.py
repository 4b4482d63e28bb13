"""Checks of a command's arguments before PyTorch is imported: the import takes seconds, and mistakes need no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm6.tasks.task import Task
    from openm6.train.recipe import AnyRecipe

MODEL = "A model directory, or a model of the catalogue (goods@live)."


def find(model: str | Path) -> Path:
    """The directory of a model: a path as it was written, or where the files of one of the catalogue are. Raises
    UsageError where there is no such model."""
    from openm6.hub.find import find_model

    found, _ = find_model(model)
    return Path(model) if Path(model).exists() else found


def find_task(model: Path | None, name: str) -> Task:
    """A task of the model by name, else one of the library by name, YAML path or instruction, as Bundle.task finds it.
    Raises UsageError where there is none."""
    from openm6.tasks.card import read_card
    from openm6.tasks.library import get

    own = {task.name: task for task in read_card(model)[0]} if model else {}
    return own.get(name) or get(name)


def check_inputs(model: str | Path, tasks: Iterable[str | None] = (), sources: Iterable[str | None] = ()) -> Path:
    """The directory of the model (see `find`), after its tasks and the data were looked for; None and "" are passed
    over. Raises UsageError for a model or task that does not exist, DataError for files that are not there."""
    from openm6.data.source import check_source

    place = find(model)
    for task in filter(None, tasks):
        find_task(place, task)
    for source in filter(None, sources):
        check_source(source)
    return place


def check_slots(task: Task, slots: dict[str, Any]) -> None:
    """Raises UsageError where slots are unknown or missing, DataError where the file of a picture is not there."""
    task.check(slots)
    check_pictures(*(value for name, value in slots.items() if task.slots[name].type == "image"))


def check_pictures(*files: str | Path) -> None:
    """Raises DataError for a file that is not there."""
    from openm6.errors import DataError

    for file in files:
        if not Path(file).is_file():
            raise DataError(f"The picture {file} does not exist or cannot be read.")


def check_parts(recipe: AnyRecipe) -> None:
    """Check that the models, codec, tokenizer, tasks and data of a recipe exist. Raises as `check_inputs` does."""
    from openm6.bases import require_model
    from openm6.data.source import check_source
    from openm6.presets import find_preset
    from openm6.tasks.card import read_card
    from openm6.train.recipe import Recipe

    model = None
    if isinstance(recipe, Recipe):
        model = recipe.model.path
        if model:
            read_card(model)
        if recipe.model.preset:
            find_preset(recipe.model.preset)
        if recipe.distill:
            read_card(recipe.distill.teacher)
        for directory, file in ((recipe.model.codec, "config.json"), (recipe.tokenizer.path, "tokenizer.json")):
            if directory:
                require_model(directory, file)
    else:
        if recipe.codec.path:
            require_model(recipe.codec.path)
        if recipe.codec.eyes:
            read_card(recipe.codec.eyes)
    for section in [*recipe.data, *recipe.evaluation.data]:
        check_source(section.source)
        for task in filter(None, (getattr(section, "task", None), getattr(section, "against", None))):
            find_task(model, task)
