"""Visits, the training and evaluation data of a recommender.

A visit is a record with history (ids, oldest first), bought (an id), optionally shown (ids of the displayed items), and
columns of context such as the season.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from openm6.core.errors import DataError, cut
from openm6.data.columns import require_columns
from openm6.data.rejects import OnReject, Reject
from openm6.data.source import Source
from openm6.data.store import Record
from openm6.retrieve.columns import id_of


def usable_visits(
    visits: Source, context: Sequence[str], known: Container[str], on_reject: OnReject | None
) -> list[Record]:
    """The visits with a valid history and a purchase among the `known` ids; `history` and `shown` are lists of ids,
    `_where` is the place of the record.

    `on_reject` gets every other visit; without it the first one raises DataError, as does a source without a valid
    visit. Raises UsageError for missing columns."""
    require_columns(visits.columns, ("history", "bought", *context), visits.name)
    usable: list[Record] = []
    rejected = list(visits.rejected)
    for number, record in enumerate(visits):
        where = str(record.get("_where", f"{visits.name}#{number}"))
        try:
            shown = record.get("shown")
            lists = {
                "history": _ids(where, "history", record.get("history")),
                "shown": [] if shown is None else _ids(where, "shown", shown),
            }
            bought = id_of(f"{where}: bought", record.get("bought"))
            if bought not in known:
                raise DataError(f"{where}: what was bought is not in the index.")
        except DataError as error:
            rejected.append(Reject(where, str(error)))
        else:
            usable.append({**record, **lists, "bought": bought, "_where": where})
    if rejected and not usable:
        raise DataError(f"None of the {len(rejected)} visits can be used; the first: {rejected[0].reason}")
    for reject in rejected:
        if on_reject is None:
            raise DataError(reject.reason)
        on_reject(reject)
    return usable


def _ids(where: str, name: str, value: Any) -> list[str]:
    """The ids of a history: a list, or a text separated by spaces or commas, as in a CSV."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list):
        given = "missing" if value is None else cut(repr(value))
        raise DataError(f"{where}: {name} is {given}; it has to be a list of ids, [] where there are none.")
    return [id_of(f"{where}: {name}", one) for one in value]
