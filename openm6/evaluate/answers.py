"""The rows of a source in their order, bad ones too, and the answers of an evaluation as JSON lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openm6.atomic import write_failed, write_file
from openm6.data.rejects import Reject
from openm6.data.source import Source
from openm6.data.store import Record
from openm6.evaluate.measure import Evaluation
from openm6.json_lines import dumps, plain


def rows_in_order(source: Source) -> Iterator[Record | Reject]:
    """The records, and between them the rows that reading left out, where their places (file:line, file#row) tell the
    order; other rejects come last."""
    waiting: dict[str, list[tuple[int, Reject]]] = {}
    for reject in source.rejected:
        file, number = place_of(reject.where)
        waiting.setdefault(file, []).append((number, reject))
    before = ""
    for record in source:
        file, number = place_of(str(record.get("_where", "")))
        if file != before:
            yield from (reject for _, reject in waiting.pop(before, ()))
            before = file
        some = waiting.get(file, [])
        while some and some[0][0] < number:
            yield some.pop(0)[1]
        yield record
    for file in [before, *waiting]:
        yield from (reject for _, reject in waiting.pop(file, ()))


def place_of(where: str) -> tuple[str, int]:
    """File and number of a place such as file:line or file#row; 0 where it has none."""
    found = re.fullmatch(r"(.*)[:#](\d+)", where, re.S)
    return (found[1], int(found[2])) if found else (where, 0)


def write_answers(path: Path, evaluation: Evaluation) -> None:
    """Write a line for each record, in order: {"where", "inputs", "answer", "references", "scores"}, or {"where",
    "error"} for one that could not be used. The file appears whole; raises OpenM6Error where it cannot be written."""

    def fill(draft: Path) -> None:
        with open(draft, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(dumps(line, plain) + "\n" for line in _lines(evaluation))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, fill)
    except OSError as error:
        raise write_failed(path, error) from None


def _lines(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    rejects = list(reversed(evaluation.rejects))
    for number, case in enumerate(evaluation.cases):
        while rejects and rejects[-1][0] <= number:
            reject = rejects.pop()[1]
            yield {"where": reject.where, "error": reject.reason}
        inputs = {n: case.record[n] for n in evaluation.inputs if not isinstance(case.record.get(n), bytes | None)}
        scores = {name: round(float(values[number]), 6) for name, values in evaluation.examples.items()}
        yield {
            "where": str(case.record.get("_where", f"record {number}")), "inputs": inputs, "answer": case.answer,
            "references": case.references, "scores": {n: s for n, s in scores.items() if not math.isnan(s)},
        }  # fmt: skip
    yield from ({"where": reject.where, "error": reject.reason} for _, reject in reversed(rejects))
