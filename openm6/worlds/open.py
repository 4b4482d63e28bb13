"""Generated data by name: `demo:VIEW/SPLIT`, `pets/SPLIT`, each with `?option=value&...`."""

from __future__ import annotations

from importlib import import_module
from urllib.parse import parse_qsl

from openm6.core.errors import UsageError
from openm6.data.source import Source
from openm6.data.store import Records

_WORLDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "demo": ("catalogue", "open_catalogue", ("seed", "pictures", "without")),
    "digits": ("digits", "open_digits", ()),
    "edits": ("edits", "open_edits", ("seed", "pictures")),
    "logos": ("logos", "open_logos", ("seed", "pictures", "side")),
    "market": ("market", "open_market", ("seed", "records")),
    "pets": ("pets", "open_pets", ("seed", "pictures")),
    "scenes": ("scenes", "open_scenes", ("seed", "pictures")),
    "shop": ("shop", "open_shop", ("seed", "records")),
    "tryon": ("figures", "open_figures", ("seed", "pictures")),
    "writing": ("writing", "open_writing", ("seed", "records")),
}
"""Module of this package, function, options. Those in `_WITH_VIEWS` have several views."""

_WITH_VIEWS = ("demo", "market", "shop")


def open_world(name: str, limit: int | None) -> Source:
    """A generated data set, or its first `limit` records. Raises UsageError for an unknown view, split or option."""
    place, _, query = name.partition("?")
    kind = place.replace(":", "/").partition("/")[0]
    module, function, known = _WORLDS[kind]
    if (":" in place) != (kind in _WITH_VIEWS):
        form = f"{kind}:VIEW/SPLIT" if kind in _WITH_VIEWS else f"{kind}/SPLIT"
        raise UsageError(f"{name}: there are no such data. Write {form}.")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := ", ".join(options.keys() - set(known)):
        raise UsageError(f"{name}: unknown option {unknown}; {kind} knows {', '.join(known) or 'none'}.")
    if any(not (value.isascii() and value.isdigit()) for value in options.values()):
        raise UsageError(f"{name}: {', '.join(options)} have to be whole numbers, not negative.")
    numbers = {key: int(value) for key, value in options.items()}
    chosen = {key: value for key, value in numbers.items() if value or key == "seed"}  # 0 pictures: the default number
    view, _, split = place.removeprefix(kind).lstrip(":").partition("/")
    views = (view,) if kind in _WITH_VIEWS else ()
    records: Records = getattr(import_module(f"openm6.worlds.{module}"), function)(*views, split or "train", **chosen)
    return Source(name, records, limit=limit, stamp=name)
