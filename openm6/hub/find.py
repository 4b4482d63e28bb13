"""A model by its directory or by its name in the catalogue: commands, server and console all look it up here."""

from __future__ import annotations

from pathlib import Path

from openm6.core.bases import base_of
from openm6.core.errors import UsageError
from openm6.hub.catalogue import Catalogue
from openm6.tasks.card import read_card


def find_model(text: str | Path) -> tuple[Path, str]:
    """The absolute directory of a model and what to call it. `text` is a model directory, or a model of the catalogue
    (NAME@3, NAME@live), whose files are fetched when they are used for the first time.

    PyTorch is not imported, MLflow only for a name. Raises UsageError where there is no such model, OpenM6Error where
    the catalogue or its files cannot be reached.
    """
    place = Path(text)
    if place.exists() or "@" not in str(text):
        read_card(place)
        base_of(place)
        place = place.resolve()
        return place, place.parent.name if place.name == "model" else place.name
    catalogue = Catalogue()
    file = catalogue.database.removeprefix("sqlite:///")
    if file != catalogue.database and not Path(file).exists():
        raise UsageError(
            f"{text} is no model directory, and the catalogue holds no model yet: `openm6 models add` puts one in."
        )
    version = catalogue.named(str(text))
    return catalogue.local(version).resolve(), version.name
