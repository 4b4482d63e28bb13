"""Two models, or two adapters, asked the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from openm6.console.desk import Desk
from openm6.console.forms import Answer, Form
from openm6.console.play import answered, chosen


def page(desk: Desk) -> None:
    say = desk.say
    with gr.Row():
        first = gr.Dropdown(label=say("First model"), interactive=True)
        second = gr.Dropdown(label=say("Second model"), interactive=True)
        task = gr.Dropdown(label=say("Task"), filterable=True, interactive=True)
    chosen(desk, first, task)

    def others() -> Any:
        found = desk.choices()
        return gr.Dropdown(choices=found, value=found[min(1, len(found) - 1)][1] if found else None)

    gr.on(None, others, None, second, api_visibility="private")

    @gr.render(
        inputs=[first, second, task], triggers=[first.change, second.change, task.change], show_progress="hidden"
    )
    def form(one: str | None, two: str | None, name: str | None) -> None:
        known = [desk.deployment(who)[0].about["tasks"] for who in (one, two) if who]
        if len(known) < 2 or name not in known[0]:
            return
        if name not in known[1]:
            gr.Markdown(say("The second model does not have this task."))
            return
        sides, name = [str(one), str(two)], str(name)
        asking = Form(desk, name, known[0][name])
        with gr.Row():
            run = gr.Button(say("Ask both"), variant="primary", elem_id="ask")
            fill = gr.Button(say("Example"), elem_id="example")
        with gr.Row():
            answers = []
            for who, tasks in zip(sides, known, strict=True):
                with gr.Column(min_width=280):
                    answers.append(Answer(desk, tasks[name], who.replace(":", " · ")))

        async def ask(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            shown = [answer.nothing() for answer in answers]
            told: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

            async def follow(number: int) -> None:
                try:
                    async for one in answered(desk, request, sides[number], asking, answers[number], values):
                        told.put_nowait((number, one))
                    told.put_nowait((number, None))
                except BaseException as error:
                    told.put_nowait((number, error))

            running = [asyncio.create_task(follow(number)) for number in range(2)]
            try:
                left = 2
                while left:
                    yield [value for answer in shown for value in answer]
                    number, found = await told.get()
                    if isinstance(found, BaseException):
                        raise found
                    if found is None:
                        left -= 1
                    else:
                        shown[number] = found
            finally:
                for each in running:
                    each.cancel()

        outputs = [component for answer in answers for component in answer.outputs]
        run.click(ask, asking.inputs, outputs, api_visibility="private", show_progress="minimal")
        fill.click(asking.example, None, asking.fields, api_visibility="private")
