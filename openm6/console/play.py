"""Try every task of every model: a form from its instruction, the answer as it is written."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from openm6.console.desk import Desk
from openm6.console.forms import Answer, Form
from openm6.images import png


def page(desk: Desk) -> None:
    say = desk.say
    with gr.Row():
        who = gr.Dropdown(label=say("Model"), scale=1, interactive=True)
        task = gr.Dropdown(label=say("Task"), scale=2, filterable=True, interactive=True)
    chosen(desk, who, task)

    @gr.render(inputs=[who, task], triggers=[task.change, who.change], show_progress="hidden")
    def form(model: str | None, name: str | None) -> None:
        if not model or not name or name not in desk.deployment(model)[0].about["tasks"]:
            return
        told = desk.deployment(model)[0].about["tasks"][name]
        gr.Textbox(told["instructions"][0], label=told["description"] or name, interactive=False, max_lines=1)
        if not told["trained"]:
            gr.Markdown(say("This model was not taught this task; it may know little of it."), elem_classes="quiet")
        with gr.Row(elem_id=f"form-{name}"):
            with gr.Column(min_width=320):
                asking = Form(desk, name, told)
                with gr.Row():
                    run = gr.Button(say("Ask"), variant="primary", elem_id="ask", min_width=90)
                    stop = gr.Button(say("Stop"), elem_id="stop", min_width=90)
                    fill = gr.Button(say("Example"), elem_id="example", min_width=90)
            with gr.Column(min_width=320):
                answer = Answer(desk, told)

        async def ask(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            yield answer.nothing()
            async for shown in answered(desk, request, model, asking, answer, values):
                yield shown

        asked = run.click(ask, asking.inputs, answer.outputs, api_visibility="private", show_progress="minimal")
        stop.click(None, cancels=[asked], api_visibility="private")
        fill.click(asking.example, None, asking.fields, api_visibility="private")
        if asking.draws and list(asking.slots.values()) == ["text"]:
            _edit(desk, model, asking, answer)


def chosen(desk: Desk, who: gr.Dropdown, task: gr.Dropdown) -> None:
    """Fill in the models when the page is opened, and the tasks when one is chosen."""

    def models() -> Any:
        found = desk.choices()
        return gr.Dropdown(choices=found, value=found[0][1] if found else None)

    def tasks(model: str | None, before: str | None) -> Any:
        found = desk.tasks(model) if model else []
        names = [name for _, name in found]
        return gr.Dropdown(choices=found, value=before if before in names else names[0] if names else None)

    gr.on(None, models, None, who, api_visibility="private")
    who.change(tasks, [who, task], task, api_visibility="private", show_progress="hidden")


async def answered(
    desk: Desk,
    request: gr.Request,
    who: str,
    form: Form,
    answer: Answer,
    values: Any,
    edit: dict[str, bytes] | None = None,
) -> AsyncGenerator[tuple[Any, ...], None]:
    """What is shown while an answer is written, and at its end."""
    asked = form.request(values)
    started, first, text = time.perf_counter(), 0.0, ""
    async for event in desk.ask(request, who, form.name, asked, edit):
        first = first or time.perf_counter() - started
        if "value" in event:
            yield answer.whole(event, asked, time.perf_counter() - started, first)
        else:
            text += event.get("piece", "")
            yield answer.written(text)


def _edit(desk: Desk, model: str, form: Form, answer: Answer) -> None:
    """A picture of which a part is painted over, to be drawn anew after the text."""
    say = desk.say
    with gr.Accordion(say("Change a part of a picture"), open=False):
        canvas = gr.ImageEditor(
            label=say("Paint over what is to be drawn anew"), type="numpy", image_mode="RGBA", layers=False,
            sources=["upload", "clipboard"], brush=gr.Brush(colors=["#ffffff"], default_size=24), transforms=(),
            height=420,
        )  # fmt: skip
        redraw = gr.Button(say("Draw that part anew"), elem_id="redraw")

    async def act(request: gr.Request, painted: Any, *values: Any) -> AsyncGenerator[Any, None]:
        if not painted or painted["background"] is None or not painted["layers"]:
            raise gr.Error(say("A picture is needed, and a part of it that is painted over."), print_exception=False)
        yield answer.nothing()
        mask = np.asarray(painted["layers"][0])[..., 3] > 0
        edit = {
            "picture": png(Image.fromarray(np.asarray(painted["background"])).convert("RGB")),
            "mask": png(Image.fromarray((mask * 255).astype(np.uint8))),
        }
        async for shown in answered(desk, request, model, form, answer, values, edit):
            yield shown

    redraw.click(act, [canvas, *form.inputs], answer.outputs, api_visibility="private", show_progress="minimal")
