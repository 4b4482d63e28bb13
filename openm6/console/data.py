"""The page Data: data sets of the catalogue, their contents and rejected records; adding one."""

from __future__ import annotations

from asyncio import to_thread
from typing import Any

import gradio as gr

from openm6.console.desk import Desk, first_step, note, shortened, table
from openm6.hub.catalogue import DATA, Version

SEEN = 12
"""Number of records whose pictures are shown."""
PROBLEMS = 200
"""Number of rejected records that are shown."""


def page(desk: Desk) -> None:
    say = desk.say
    empty = gr.HTML(apply_default_css=False)
    with gr.Column(visible=False) as whole:
        known = gr.Dropdown(label=say("Data set"), interactive=True, elem_id="known")
        facts = gr.HTML(apply_default_css=False)
        pictures = gr.Gallery(label=say("Pictures"), columns=6, height=260, format="png", visible=False)
        problems = gr.HTML(apply_default_css=False)
    seen = note()

    def names(select: str | None = None) -> Any:
        found = [one.full_name for one in desk.catalogue.every(DATA)]
        text = say(
            "The catalogue has no data set yet. Add one below or with this command; its files stay where they are."
        )
        return [
            "" if found else first_step(text, "openm6 data add reviews reviews.jsonl"),
            gr.Column(visible=bool(found)),
            gr.Dropdown(choices=found, value=select or (found[-1] if found else None)),
        ]

    async def listed(request: gr.Request) -> Any:
        desk.key(request)
        return await to_thread(names)

    async def look(request: gr.Request, name: str | None) -> Any:
        desk.key(request)
        if not name:
            return ["", gr.skip(), ""]
        return await to_thread(lambda: _look(desk, desk.catalogue.named(name, DATA)))

    with gr.Accordion(say("Add a data set"), open=False):
        with gr.Row():
            with gr.Column(min_width=240):
                name = gr.Textbox(label=say("Name"), placeholder="reviews", elem_id="data-name")
                name_note = note()
            with gr.Column(min_width=240):
                source = gr.Textbox(
                    label=say("Source"), placeholder="/data/items.jsonl, demo:items/train", elem_id="data-source"
                )
                source_note = note()
        add = gr.Button(say("Add"), variant="primary", elem_id="add")
        places = {"name": name_note, "source": source_note, "": note()}

    async def added(request: gr.Request, called: str, place: str) -> Any:
        desk.manager(request)
        if not called.strip():
            raise desk.error("The data set needs a name.", param="name")
        if not place.strip():
            raise desk.error("Enter the data source: a file, a folder or a built-in data set.", param="source")
        version = await to_thread(desk.catalogue.add_data, called.strip(), place.strip())
        return await to_thread(names, version.full_name)

    listing = [empty, whole, known]
    desk.on(None, listed, outputs=listing, notes={"": seen})
    desk.on(known.change, look, [known], [facts, pictures, problems], {"": seen})
    desk.on([add.click, name.submit, source.submit], added, [name, source], listing, places)


def _look(desk: Desk, version: Version) -> list[Any]:
    """Contents of a version as the catalogue stores them, and pictures and rejected records of the current data."""
    from openm6.data.source import open_source

    say, about = desk.say, version.about
    facts = [
        [say("records"), about["records"]], [say("rejected"), about["rejected"]],
        [say("source"), about["source"]], [say("hash"), about["hash"][:16]],
        [say("added"), desk.time(version.created)],
    ]  # fmt: skip
    columns = list(about["columns"])
    rows = [[shortened(row.get(head), 120) for head in columns] for row in desk.catalogue.sample(version)]
    text = table([say("version"), version.full_name], facts, say("Overview"))
    text += table([say("column"), say("type")], list(about["columns"].items()), say("Columns"))
    text += table(columns, rows, say("The first records"))
    pictures, problems, seen = [], [], set[bytes]()
    try:
        records = open_source(about["source"], about.get("format"), about.get("images"))
        for number in range(0, len(records), max(1, len(records) // SEEN)):
            for name, value in records[number].items():
                if isinstance(value, bytes) and value not in seen and (opened := _picture(value)):
                    seen.add(value)
                    pictures.append((opened, name))
        problems = [[reject.where, reject.reason] for reject in records.rejected[:PROBLEMS]]
    except Exception as error:  # the source may be gone; the catalogue's copy is still shown
        problems = [[about["source"], say("It can no longer be read ({why}).", why=type(error).__name__)]]
    wrong = table([say("location"), say("reason")], problems, say("Rejected records")) if problems else ""
    return [text, gr.Gallery(pictures, visible=bool(pictures)), wrong]


def _picture(value: bytes) -> Any:
    from openm6.core.errors import DataError
    from openm6.core.images import open_image

    try:
        return open_image(value)
    except DataError:
        return None
