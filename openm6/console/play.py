"""The page Try: a form for every task of every model, with streamed answers."""

from __future__ import annotations

import html
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import gradio as gr
import numpy as np

from openm6.console.context import PageContext, notes
from openm6.console.forms import Answer, Form
from openm6.inference.edit import MARKED, Cut
from openm6.serve.incoming import cut_for

LOOK = "() => document.getElementById('answer')?.scrollIntoView({block: 'nearest', behavior: 'smooth'})"
"""Script that scrolls to the answer, which may be below the screen on a phone, when it begins and when it ends."""

LEAVE = "() => document.getElementById('stop')?.click()"
"""Script that stops the answer of a form that is left: it would run on unseen, and later answers would wait for it. A
form cannot cancel it at events of components outside of itself."""


def page(ui: PageContext) -> None:
    say = ui.say
    with gr.Row(elem_classes="choice"):
        who = gr.Dropdown(label=say("Model"), scale=1, min_width=120, interactive=True, elem_id="who")
        task = gr.Dropdown(label=say("Task"), scale=2, min_width=160, interactive=True, elem_id="task")
    fill_choices(ui, who, task)
    gr.on([task.change, who.change], None, None, None, js=LEAVE, api_visibility="private")

    @gr.render(inputs=[who, task], triggers=[task.change, who.change], show_progress="hidden")
    def form(model: str | None, name: str | None) -> None:
        if not model or not name or name not in ui.deployment(model)[0].about["tasks"]:
            return
        about = ui.deployment(model)[0].about["tasks"][name]
        gr.HTML(heading(ui, name, about), apply_default_css=False)
        with gr.Row(elem_id=f"form-{name}"):
            with gr.Column(min_width=300):
                asking = Form(ui, name, about)
                with gr.Row(elem_classes="buttons"):
                    run = gr.Button(say("Run"), variant="primary", elem_id="ask", min_width=80)
                    fill = gr.Button(say("Example"), elem_id="example", min_width=80)
                    stop = gr.Button(say("Stop"), elem_id="stop", min_width=80)
                asking.notes[""].render()
            with gr.Column(min_width=300, elem_id="answer"):
                answer = Answer(ui, about)
        places = [*asking.notes.values(), *answer.outputs]

        async def ask(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            yield [*ui.beside(asking.notes), *answer.nothing()]
            try:
                async for shown in stream_answer(ui, request, model, asking, answer, values):
                    yield [*[gr.skip()] * len(asking.notes), *shown]
            except Exception as error:
                yield [*ui.beside(asking.notes, ui.unforeseen(error)), *answer.nothing()]

        events = [run.click, *asking.enters]
        gr.on(events, None, None, None, js=LOOK, api_visibility="private")
        asked = gr.on(events, ask, asking.inputs, places, api_visibility="private", show_progress="minimal")
        asked.then(None, None, None, js=LOOK, api_visibility="private")  # the whole answer, which has grown
        stop.click(None, cancels=[asked], api_visibility="private")
        fill.click(asking.example, None, asking.fields, api_visibility="private")
        if asking.draws and list(asking.slots.values()) == ["text"]:
            _edit(ui, model, asking, answer)


def heading(ui: PageContext, name: str, about: Any) -> str:
    """The title of a task, its name in the API, and a warning if the model was not trained on it."""
    title, description = ui.title(name, about["description"]), about["description"]
    rest = description.removeprefix(title).strip("： ") if ui.language == "zh" else ""
    more = f"<p>{html.escape(rest)}</p>" if rest else ""
    if not about["trained"]:
        hint = ui.say("This model was not trained on this task: its answers are meaningless. Fine-tune it first.")
        more += f'<p class="hint"><a href="finetune">{hint}</a></p>'
    return f'<div class="task"><h2>{html.escape(title)}</h2><code>{html.escape(name)}</code>{more}</div>'


def fill_choices(ui: PageContext, who: gr.Dropdown, task: gr.Dropdown) -> None:
    """Fill in the models at page load and the tasks when a model is chosen: the tasks it was trained on, the others on
    request."""
    text = ui.say("Also show tasks that the model was not trained on")
    every = gr.Checkbox(label=text, visible=False, elem_id="every", container=False)

    async def models() -> Any:
        found = ui.choices()
        return gr.Dropdown(choices=found, value=found[0][1] if found else None)

    async def tasks(model: str | None, before: str | None, untrained: bool) -> Any:
        known, others = (ui.tasks(model, trained) for trained in (True, False)) if model else ([], [])
        marked = [(f"{title} ({ui.say('not trained')})", name) for title, name in others] if known else others
        found = [*known, *(marked if untrained or not known else [])]
        names = [name for _, name in found]
        value = before if before in names else names[0] if names else None
        return gr.Dropdown(choices=found, value=value), gr.Checkbox(visible=bool(known and others))

    ui.on(None, models, outputs=[who])
    ui.on([who.change, every.change], tasks, [who, task, every], [task, every], show_progress="hidden")


async def stream_answer(
    ui: PageContext,
    request: gr.Request,
    who: str,
    form: Form,
    answer: Answer,
    values: Any,
    region: Cut | None = None,
) -> AsyncGenerator[tuple[Any, ...], None]:
    """Values of `answer.outputs` while an answer is generated, and at its end. Raises OpenM6Error."""
    asked = await to_thread(form.request, values)  # a large picture takes a while to be opened
    started, first, text = time.perf_counter(), 0.0, ""
    async for event in ui.ask(request, who, form.name, asked, region):
        first = first or time.perf_counter() - started
        if "value" in event:
            yield answer.whole(event, asked, time.perf_counter() - started, first)
        else:
            text += event.get("piece", "")
            yield answer.written(text)


def _edit(ui: PageContext, model: str, form: Form, answer: Answer) -> None:
    """Inpainting: an editor on which a region is painted over, which is redrawn after the text."""
    say = ui.say
    with gr.Accordion(say("Redraw part of a picture"), open=False):
        canvas = gr.ImageEditor(
            label=say("Paint over the region to redraw"), type="numpy", image_mode="RGBA", layers=False,
            sources=["upload", "clipboard"], brush=gr.Brush(colors=["#ffffff"], default_size=24), transforms=(),
            height=420,
        )  # fmt: skip
        redraw = gr.Button(say("Redraw"), elem_id="redraw")
        own = notes("")

    async def act(request: gr.Request, painted: Any, *values: Any) -> AsyncGenerator[Any, None]:
        yield [*ui.beside(own), *answer.nothing()]
        try:
            if not painted or painted["background"] is None or not painted["layers"]:
                raise ui.error("Upload a picture and paint over the region to redraw.")
            region = await to_thread(_region, ui, model, painted)
            if region.covers_all:
                warning = ui.error("The whole picture is painted over: all of it is redrawn.")
                yield [*ui.beside(own, warning), *[gr.skip()] * len(answer.outputs)]
            async for shown in stream_answer(ui, request, model, form, answer, values, region):
                yield [gr.skip(), *shown]
        except Exception as error:
            yield [*ui.beside(own, ui.unforeseen(error)), *answer.nothing()]

    places = [*own.values(), *answer.outputs]
    redraw.click(act, [canvas, *form.inputs], places, api_visibility="private", show_progress="minimal")


def _region(ui: PageContext, model: str, painted: Mapping[str, Any]) -> Cut:
    """The region to redraw of a painted picture. A background without transparency becomes RGB."""
    background, layer = np.asarray(painted["background"]), np.asarray(painted["layers"][0])
    picture = background if (background[..., 3] < 255).any() else background[..., :3]
    mask = layer[..., 3] >= MARKED
    if not mask.any():
        raise ui.error("Upload a picture and paint over the region to redraw.")
    return cut_for(ui.deployment(model)[0], np.ascontiguousarray(picture), mask)
