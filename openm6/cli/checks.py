"""Checks of a command's arguments before PyTorch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from openm6.core.bases import require_model
from openm6.core.errors import DataError, UsageError
from openm6.core.files import require_writable
from openm6.hub.catalogue import find_model
from openm6.model.presets import find_preset

if TYPE_CHECKING:
    from openm6.tasks.task import Task
    from openm6.train.recipe import AnyRecipe

CLEAR = (".png", ".webp", ".tif", ".tiff")
"""Extensions of picture files that can be written with transparency."""
PICTURES = (*CLEAR, ".jpg", ".jpeg", ".bmp")
"""Extensions of picture files that can be written."""
MODEL = "Model directory, or model of the catalogue (goods@live)."


def find(model: str | Path) -> Path:
    """The directory of a model: the given path, or the local files of a catalogue model. Raises UsageError for an
    unknown model."""
    found, _ = find_model(model)
    return Path(model) if Path(model).exists() else found


def find_task(model: Path | None, name: str) -> Task:
    """A task of the model by name, else of the library by name, YAML path or instruction (as Session.task). Raises
    UsageError for an unknown task."""
    from openm6.tasks.card import read_card
    from openm6.tasks.library import get

    own = {task.name: task for task in read_card(model)[0]} if model else {}
    return own.get(name) or get(name)


def check_inputs(model: str | Path, tasks: Iterable[str | None] = (), sources: Iterable[str | None] = ()) -> Path:
    """The directory of the model (see `find`) after checking that tasks and sources exist; None and "" are skipped.
    Raises UsageError for an unknown model or task, DataError for missing files."""
    from openm6.data.source import check_source

    place = find(model)
    for task in filter(None, tasks):
        find_task(place, task)
    for source in filter(None, sources):
        check_source(source)
    return place


def check_slots(task: Task, slots: dict[str, Any]) -> None:
    """Raises UsageError for unknown or missing slots, DataError for a missing picture file."""
    task.check(slots)
    check_pictures(*(value for name, value in slots.items() if task.slots[name].type == "image"))


def check_pictures(*files: str | Path) -> None:
    """Raises DataError for a missing file."""
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"The picture {file} does not exist or cannot be read.")


def check_output(file: Path, endings: Sequence[str] = ()) -> None:
    """Raises UsageError for a file that cannot be written: with an extension other than `endings`, in a read-only
    folder, or where a folder is. Missing folders are allowed."""
    if endings and file.suffix.lower() not in endings:
        raise UsageError(f"{file} ends in {file.suffix or 'nothing'}; it has to end in {', '.join(endings)}.")
    if file.is_dir():
        raise UsageError(f"{file} is a folder: name a file.")
    require_writable(file.parent)


def refuse_idle(context: typer.Context, heeded: Sequence[str], reason: str) -> None:
    """Raises UsageError for an option given on the command line that has no effect, i.e. is not among the parameters
    `heeded`."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in heeded and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]} does nothing here: {reason}")


def check_parts(recipe: AnyRecipe) -> None:
    """Check that the models, codec, tokenizer, tasks and data of a recipe exist. Errors: see `check_inputs`."""
    from openm6.data.source import check_source
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
        if recipe.codec.perceptual_model:
            read_card(recipe.codec.perceptual_model)
    sections = [*recipe.data, *recipe.evaluation.data]
    for section in sections:
        for task in filter(None, (getattr(section, "task", None), getattr(section, "against", None))):
            find_task(model, task)
    for section in sections:  # last: generated data is drawn when it is opened first, for up to a minute
        check_source(section.source)
