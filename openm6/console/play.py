"""Try every task of every model: a form from its instruction, the answer as it is written."""

from __future__ import annotations

import html
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import gradio as gr
import numpy as np

from openm6.console.desk import Desk, notes
from openm6.console.forms import Answer, Form
from openm6.inference.edit import MARKED, Cut
from openm6.serve.edits import cut_for

LOOK = "() => document.getElementById('answer')?.scrollIntoView({block: 'nearest', behavior: 'smooth'})"
"""On a phone the answer may begin below the screen."""


def page(desk: Desk) -> None:
    say = desk.say
    with gr.Row(elem_classes="choice"):
        who = gr.Dropdown(label=say("Model"), scale=1, min_width=120, interactive=True, elem_id="who")
        task = gr.Dropdown(label=say("Task"), scale=2, min_width=160, interactive=True, elem_id="task")
    chosen(desk, who, task)

    @gr.render(inputs=[who, task], triggers=[task.change, who.change], show_progress="hidden")
    def form(model: str | None, name: str | None) -> None:
        if not model or not name or name not in desk.deployment(model)[0].about["tasks"]:
            return
        told = desk.deployment(model)[0].about["tasks"][name]
        gr.HTML(heading(desk, name, told), apply_default_css=False)
        with gr.Row(elem_id=f"form-{name}"):
            with gr.Column(min_width=300):
                asking = Form(desk, name, told)
                with gr.Row(elem_classes="buttons"):
                    run = gr.Button(say("Ask"), variant="primary", elem_id="ask", min_width=80)
                    fill = gr.Button(say("Example"), elem_id="example", min_width=80)
                    stop = gr.Button(say("Stop"), elem_id="stop", min_width=80)
                asking.notes[""].render()
            with gr.Column(min_width=300, elem_id="answer"):
                answer = Answer(desk, told)
        places = [*asking.notes.values(), *answer.outputs]

        async def ask(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            yield [*desk.beside(asking.notes), *answer.nothing()]
            try:
                async for shown in answered(desk, request, model, asking, answer, values):
                    yield [*[gr.skip()] * len(asking.notes), *shown]
            except Exception as error:
                yield [*desk.beside(asking.notes, desk.unforeseen(error)), *answer.nothing()]

        events = [run.click, *asking.enters]
        gr.on(events, None, None, None, js=LOOK, api_visibility="private")
        asked = gr.on(events, ask, asking.inputs, places, api_visibility="private", show_progress="minimal")
        stop.click(None, cancels=[asked], api_visibility="private")
        fill.click(asking.example, None, asking.fields, api_visibility="private")
        if asking.draws and list(asking.slots.values()) == ["text"]:
            _edit(desk, model, asking, answer)


def heading(desk: Desk, name: str, told: Any) -> str:
    """The task in words, its name for the API, and a warning where the model was never taught it."""
    title, description = desk.title(name, told["description"]), told["description"]
    rest = description.removeprefix(title).strip("： ") if desk.language == "zh" else ""
    more = f"<p>{html.escape(rest)}</p>" if rest else ""
    if not told["trained"]:
        hint = desk.say("This model was never taught this task: its answers mean nothing. Teach it first.")
        more += f'<p class="hint"><a href="teach">{hint}</a></p>'
    return f'<div class="task"><h2>{html.escape(title)}</h2><code>{html.escape(name)}</code>{more}</div>'


def chosen(desk: Desk, who: gr.Dropdown, task: gr.Dropdown) -> None:
    """Fill in the models when the page is opened, and the tasks when one is chosen: those that it was taught, the
    others when they are asked for."""
    every = gr.Checkbox(
        label=desk.say("Show tasks that it was never taught, too"), visible=False, elem_id="every", container=False
    )

    async def models(request: gr.Request) -> Any:
        found = desk.choices()
        return gr.Dropdown(choices=found, value=found[0][1] if found else None)

    async def tasks(request: gr.Request, model: str | None, before: str | None, untaught: bool) -> Any:
        taught, others = (desk.tasks(model, trained) for trained in (True, False)) if model else ([], [])
        marked = [(f"{title} ({desk.say('never taught')})", name) for title, name in others] if taught else others
        found = [*taught, *(marked if untaught or not taught else [])]
        names = [name for _, name in found]
        value = before if before in names else names[0] if names else None
        return gr.Dropdown(choices=found, value=value), gr.Checkbox(visible=bool(taught and others))

    desk.on(None, models, outputs=[who])
    desk.on([who.change, every.change], tasks, [who, task, every], [task, every], show_progress="hidden")


async def answered(
    desk: Desk,
    request: gr.Request,
    who: str,
    form: Form,
    answer: Answer,
    values: Any,
    region: Cut | None = None,
) -> AsyncGenerator[tuple[Any, ...], None]:
    """What is shown while an answer is written, and at its end. Raises OpenM6Error."""
    asked = await to_thread(form.request, values)  # a large picture takes a while to be opened
    started, first, text = time.perf_counter(), 0.0, ""
    async for event in desk.ask(request, who, form.name, asked, region):
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
        own = notes("")

    async def act(request: gr.Request, painted: Any, *values: Any) -> AsyncGenerator[Any, None]:
        yield [*desk.beside(own), *answer.nothing()]
        try:
            if not painted or painted["background"] is None or not painted["layers"]:
                raise desk.error("A picture is needed, and a part of it that is painted over.")
            region = await to_thread(_region, desk, model, painted)
            if region.covers_all:
                warning = desk.error("All of the picture is painted over: all of it is drawn anew.")
                yield [*desk.beside(own, warning), *[gr.skip()] * len(answer.outputs)]
            async for shown in answered(desk, request, model, form, answer, values, region):
                yield [gr.skip(), *shown]
        except Exception as error:
            yield [*desk.beside(own, desk.unforeseen(error)), *answer.nothing()]

    places = [*own.values(), *answer.outputs]
    redraw.click(act, [canvas, *form.inputs], places, api_visibility="private", show_progress="minimal")


def _region(desk: Desk, model: str, painted: Mapping[str, Any]) -> Cut:
    """What is redrawn of a picture on which somebody has painted. A background without transparency becomes RGB."""
    background, layer = np.asarray(painted["background"]), np.asarray(painted["layers"][0])
    picture = background if (background[..., 3] < 255).any() else background[..., :3]
    mask = layer[..., 3] >= MARKED
    if not mask.any():
        raise desk.error("A picture is needed, and a part of it that is painted over.")
    return cut_for(desk.deployment(model)[0], np.ascontiguousarray(picture), mask)
