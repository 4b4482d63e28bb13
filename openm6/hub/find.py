"""Looking up a model by its directory or by its name in the catalogue."""

from __future__ import annotations

from pathlib import Path

from openm6.core.bases import base_of
from openm6.core.errors import UsageError
from openm6.hub.catalogue import Catalogue
from openm6.tasks.card import read_card


def find_model(text: str | Path) -> tuple[Path, str]:
    """The absolute directory of a model and its default name. `text` is a model directory, or a model of the catalogue
    (NAME@3, NAME@live), whose files are fetched on first use.

    PyTorch is not imported, MLflow only for a catalogue name. Raises UsageError for an unknown model, OpenM6Error if
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
            f"{text} is not a model directory, and the catalogue is empty: add a model by `openm6 models add`."
        )
    version = catalogue.named(str(text))
    return catalogue.local(version).resolve(), version.name
