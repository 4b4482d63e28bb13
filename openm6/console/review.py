"""The page Review: human labels for batches of texts and pictures, one candidate at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.context import PageContext, listing, note, plain
from openm6.core.images import open_image
from openm6.studio.copy import write_labelled_copy
from openm6.studio.images import write_labelled
from openm6.studio.review import SETTINGS, Verdict, as_line, rows_of, settings_of, verdicts_on, write

LABELS = "labels.jsonl"
DEPTH = 3
"""Maximum depth of a batch below the root folder of batches."""


def page(ui: PageContext) -> None:
    say = ui.say
    empty = gr.HTML(apply_default_css=False)
    with gr.Column(visible=False) as whole:
        batch = gr.Dropdown(label=say("Batch"), interactive=True, elem_id="batch")
        place = gr.State(0)
        far = gr.Markdown(elem_id="far")
        with gr.Row():
            with gr.Column(min_width=280):
                given = gr.Textbox(label=say("Input"), lines=2, interactive=False)
                seen = gr.Gallery(
                    label=say("Input pictures"), height=240, columns=2, visible=False, format="png",
                    elem_classes="whole",
                )  # fmt: skip
            with gr.Column(min_width=280):
                said = gr.Textbox(label=say("Text"), lines=2, interactive=False, elem_classes="said", elem_id="said")
                drawn = gr.Gallery(
                    label=say("Picture"), height=240, columns=1, visible=False, format="png", elem_classes="whole"
                )
        with gr.Row(elem_classes="buttons"):
            accept = gr.Button(say("Accept (A)"), variant="primary", elem_id="accept", min_width=90)
            reject = gr.Button(say("Reject (R)"), elem_id="reject", min_width=90)
            back = gr.Button(say("Back (U)"), elem_id="back", min_width=90)
        wrong = {"": note()}
        finish = gr.Button(say("Write training data from the verdicts"), elem_id="finish")
        made = gr.Markdown()
    shown = [place, far, given, seen, said, drawn]

    def batches() -> list[Any]:
        found = [str(path) for path in _batches(ui.batches)]
        text = say("There is no batch to review in {folder}. Generate one with:", folder=ui.batches)
        command = f"openm6 copy batch runs/demo/model --items goods.csv --output {ui.batches}/copy-1"
        return listing(found, found[0] if found else None, text, command)

    def finished(name: str | None) -> str:
        found = _finish(_known(ui, name))
        return say(
            "{accepted} of {labelled} accepted. Training data: {file}", accepted=f"{found['accepted']:.0%}",
            labelled=found["labelled"], file=f"`{found['file']}`",
        )  # fmt: skip

    ui.on(None, batches, outputs=[empty, whole, batch])
    ui.on(batch.change, lambda name: _show(ui, name, None), [batch], shown, wrong)
    for button, accepted in ((accept, True), (reject, False), (back, None)):
        judge = partial(_judge, ui, accepted)
        ui.on(button.click, judge, [batch, place], shown, wrong, show_progress="hidden")
    ui.on(finish.click, finished, [batch], [made], wrong)


def _batches(folder: Path) -> list[Path]:
    found = (
        path.parent for depth in range(1, DEPTH + 1) for path in folder.glob("/".join(["*"] * depth) + f"/{SETTINGS}")
    )
    return sorted(found, key=lambda path: -path.stat().st_mtime)


def _known(ui: PageContext, name: str | None) -> Path:
    """The batch of this name, if it is listed: a browser may send any name. Raises PageError."""
    if not name:
        raise ui.error("Choose a batch first.")
    found = next((path for path in _batches(ui.batches) if str(path) == name), None)
    if found is None:
        raise ui.error("This batch no longer exists.")
    return found


def _read(batch: Path) -> tuple[list[dict[str, Any]], dict[str, Verdict]]:
    """The candidates of a batch, and the verdicts on them by file."""
    rows, labels, verdicts = list(rows_of(batch)), batch / LABELS, dict[str, Verdict]()
    if labels.is_file() and labels.stat().st_size:
        verdicts = verdicts_on({row["file"] for row in rows}, batch, "candidate", labels)
    return [row for row in rows if row["rank"]], verdicts


def _judge(ui: PageContext, accepted: bool | None, name: str | None, number: int) -> list[Any]:
    """Store a verdict and show the next candidate; for None show the previous one."""
    batch = _known(ui, name)
    if accepted is None:
        return _show(ui, name, max(0, number - 1))
    rows, verdicts = _read(batch)
    if number < len(rows):
        file = rows[number]["file"]
        before = verdicts.get(file)
        verdicts[file] = Verdict(accepted, before.text if before and accepted else "", "")
        write(batch / LABELS, (as_line(verdict.line(file)) for file, verdict in verdicts.items()))
    return _show(ui, name, number + 1)


def _show(ui: PageContext, name: str | None, number: int | None) -> list[Any]:
    """Show a candidate; without a number the first one without a verdict."""
    nothing = [0, "", "", gr.Gallery(visible=False), "", gr.Gallery(visible=False)]
    if not name:
        return nothing
    batch, say = _known(ui, name), ui.say
    rows, verdicts = _read(batch)
    if number is None:
        number = next((n for n, row in enumerate(rows) if row["file"] not in verdicts), len(rows))
    counts = {"done": len(verdicts), "all": len(rows), "accepted": sum(one.accepted for one in verdicts.values())}
    text = say("{done} of {all} reviewed, {accepted} accepted", **counts)
    if number >= len(rows):
        return [number, text, *nothing[2:]]
    row, slots = rows[number], settings_of(batch)["slots"]
    if (before := verdicts.get(row["file"])) is not None:
        text += " · " + (say("this one: accepted") if before.accepted else say("this one: rejected"))
    asked = {slot: value for slot, value in row["asked"].items() if slots.get(slot) != "image"}
    pictures = [batch / str(value) for slot, value in row["asked"].items() if slots.get(slot) == "image"]
    opened = [open_image(path) for path in pictures if path.is_file()]
    said = (before and before.text) or row.get("said", "")
    lines = "\n".join(f"{ui.slot(slot)}: {plain(value)}" for slot, value in asked.items())
    return [
        number, f"**{number + 1}/{len(rows)}** · {text}", gr.Textbox(lines, visible=bool(lines)),
        gr.Gallery(opened, visible=bool(opened)), gr.Textbox(said, visible="said" in row),
        gr.Gallery([] if "said" in row else [open_image(batch / row["file"])], visible="said" not in row),
    ]  # fmt: skip


def _finish(batch: Path) -> dict[str, Any]:
    act = write_labelled_copy if settings_of(batch)["kind"] == "texts" else write_labelled
    return act(batch, batch / LABELS)
