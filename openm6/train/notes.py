"""What is said of a run's data before it begins."""

from __future__ import annotations

from openm6.data.loader import Entry


def data_notes(entries: list[Entry]) -> list[str]:
    """Sentences on the classes of each source's labels."""
    return [
        f"{entry.name}: {text}"
        for entry in entries
        for slot, classes in entry.classes.items()
        for text in classes.sentences(slot)
    ]
