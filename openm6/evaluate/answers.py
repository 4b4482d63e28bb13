"""The answers of an evaluation as JSON lines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openm6.core.files import write_failed, write_file
from openm6.data.writers import write_jsonl
from openm6.evaluate.measure import Evaluation


def write_answers(path: Path, evaluation: Evaluation) -> None:
    """Write a line per record, in order: {"where", "inputs", "answer", "references", "scores"}, or {"where", "error"}
    for a rejected one. The file is written atomically. Raises OpenM6Error if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda draft: write_jsonl(draft, (), lambda: _lines(evaluation)))
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
