"""The data sets of the catalogue: what is in them, what is wrong with them, and new ones."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openm6.console.desk import Desk, shortened
from openm6.hub.catalogue import DATA, Version

SEEN = 12
"""Records of which pictures are shown."""
PROBLEMS = 200


def page(desk: Desk) -> None:
    say = desk.say
    gr.Markdown(say("Data sets stay where they are; the catalogue keeps what they were like when they were added."))
    known = gr.Dropdown(label=say("Data set"), interactive=True, elem_id="known")
    facts = gr.Dataframe(headers=["", ""], label=say("What it is like"), interactive=False, type="array")
    columns = gr.Dataframe(
        headers=[say("column"), say("values")], label=say("Columns"), interactive=False, type="array"
    )
    sample = gr.Dataframe(label=say("The first records"), interactive=False, wrap=True)
    pictures = gr.Gallery(label=say("Pictures"), columns=6, height=260, format="png")
    problems = gr.Dataframe(
        headers=[say("where"), say("why")], label=say("Records that cannot be used"), interactive=False, type="array"
    )
    shown = [facts, columns, sample, pictures, problems]

    def names(select: str | None = None) -> Any:
        found = [one.full_name for one in desk.catalogue.every(DATA)]
        return gr.Dropdown(choices=found, value=select or (found[-1] if found else None))

    async def listed(request: gr.Request) -> Any:
        desk.key(request)
        return await desk.do(names)

    async def look(request: gr.Request, name: str | None) -> Any:
        desk.key(request)
        if not name:
            return [[], [], None, [], []]
        return await desk.do(lambda: _look(desk, desk.catalogue.named(name, DATA)))

    gr.on(None, listed, None, known, api_visibility="private")
    known.change(look, known, shown, api_visibility="private")
    with gr.Accordion(say("Add a data set"), open=False):
        with gr.Row():
            name = gr.Textbox(label=say("Name"), elem_id="data-name")
            source = gr.Textbox(
                label=say("Where it is"), placeholder="/data/items.jsonl, demo:items/train ...", elem_id="data-source"
            )
        add = gr.Button(say("Add"), variant="primary", elem_id="add")

    async def added(request: gr.Request, called: str, place: str) -> Any:
        desk.manager(request)
        version = await desk.do(lambda: desk.catalogue.add_data(called.strip(), place.strip()))
        return await desk.do(lambda: names(version.full_name))

    add.click(added, [name, source], known, api_visibility="private")


def _look(desk: Desk, version: Version) -> list[Any]:
    """What is shown of a version: what the catalogue kept, and pictures and problems of the data as they are now."""
    from openm6.data.source import open_source

    say, about = desk.say, version.about
    facts = [
        [say("version"), version.full_name], [say("records"), str(about["records"])],
        [say("cannot be used"), str(about["rejected"])], [say("where it is"), about["source"]],
        [say("hash"), about["hash"][:16]], [say("added"), desk.time(version.created)],
    ]  # fmt: skip
    columns = [[name, kinds] for name, kinds in about["columns"].items()]
    rows = desk.catalogue.sample(version)
    heads = list(about["columns"])
    sample = {"headers": heads, "data": [[shortened(row.get(head), 120) for head in heads] for row in rows]}
    pictures, problems, seen = [], [], set[bytes]()
    try:
        records = open_source(about["source"], about.get("format"), about.get("images"))
        for number in range(0, len(records), max(1, len(records) // SEEN)):
            for name, value in records[number].items():
                if isinstance(value, bytes) and value not in seen and (opened := _picture(value)):
                    seen.add(value)
                    pictures.append((opened, name))
        problems = [[reject.where, reject.reason] for reject in records.rejected[:PROBLEMS]]
    except Exception as error:  # what was added may have gone: the rest is shown all the same
        problems = [[about["source"], say("It cannot be read any more ({why}).", why=type(error).__name__)]]
    return [facts, columns, sample, pictures, problems]


def _picture(value: bytes) -> Any:
    from openm6.errors import DataError
    from openm6.images import open_image

    try:
        return open_image(value)
    except DataError:
        return None
