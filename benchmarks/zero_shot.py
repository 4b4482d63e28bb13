"""The library's tasks with English instructions, asked of an imported SmolLM2-135M-Instruct that was trained on none of
them: is the answer in form? A label is of its set, a table or triples are JSON with rows, a text is not empty and ends
by itself. Each task is asked the records of RECORDS, or its own example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, require_model
from openm6.inference.session import Session
from openm6.tasks.library import get, names

TITLE = "Tasks of the library, asked of SmolLM2-135M-Instruct without training"

RECORDS: dict[str, list[dict[str, Any]]] = {
    "text_classification_en": [
        {"text": text, "choices": ["positive", "negative"]}
        for text in ("I love this dress, it fits.", "The zip broke on the first day.", "Soft and warm.")
    ],
    "question_answering_en": [
        {"question": f"What is the capital of {place}?"} for place in ("France", "Japan", "Spain")
    ],
    "summary_en": [
        {"passage": "The shop opens at nine. On Sundays it is closed. Parcels can be returned within thirty days, if "
         "the label is on them, and money comes back within a week."},
    ],
}  # fmt: skip


def run(root: Path = ROOT) -> tuple[list[dict[str, Any]], str]:
    model = root / "smollm2"
    require_model(model, "import it as docs/open-models.md says")
    session, rows = Session.load(model), []
    for name in (name for name in names() if name.endswith("_en")):
        task = get(name)
        own = {slot: task.example[slot] for slot in task.inputs if slot in task.example}
        found = [_asked(session, name, record) for record in (own, *RECORDS.get(name, []))]
        answer = found[0][0]
        rows.append(
            {
                "task": name, "output": task.slots[task.outputs[0]].type, "asked": len(found),
                "in form": sum(good for _, good in found), "answer to the example": _cut(answer),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    whole = sum(row["in form"] == row["asked"] for row in rows)
    note = (
        f"{whole} of {len(rows)} tasks gave every answer in form; the most probable tokens, in the precision of this "
        "machine. In form is not right: a model of 135 million parameters knows little."
    )
    return rows, note


def _asked(session: Session, name: str, record: dict[str, Any]) -> tuple[Any, bool]:
    """The answer, and whether it is in form."""
    task = session.task(name)
    item = session.prepare(task, record)
    (answer,) = session.answers(task, [item])
    value, kind = answer.value, task.slots[task.outputs[0]].type
    if kind == "label":
        known = record.get("choices") or task.labels.get(task.outputs[0], ())
        return value, str(value) in [str(one) for one in known]
    if len(task.outputs) > 1:
        return value, answer.finished and all(map(str.strip, value.values()))
    return value, bool(value) and answer.finished


def _cut(answer: Any) -> str:
    text = " ".join(str(answer).split())
    return text if len(text) <= 90 else f"{text[:89]}…"
