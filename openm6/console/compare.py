"""The page Compare: one input, two models or adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from openm6.console.desk import Desk, first_step
from openm6.console.forms import Answer, Form
from openm6.console.play import LOOK, fill_choices, heading, stream_answer


def page(desk: Desk) -> None:
    say = desk.say
    with gr.Row(elem_classes="choice"):
        first = gr.Dropdown(label=say("First model"), min_width=120, interactive=True)
        second = gr.Dropdown(label=say("Second model"), min_width=120, interactive=True)
        task = gr.Dropdown(label=say("Task"), min_width=240, interactive=True)
    fill_choices(desk, first, task)
    alone = gr.HTML(apply_default_css=False)

    async def others(request: gr.Request) -> Any:
        found = desk.choices()
        text = say("Only one model is served. Serve two to compare them:")
        return (
            gr.Dropdown(choices=found, value=found[min(1, len(found) - 1)][1] if found else None),
            "" if len(found) > 1 else first_step(text, "openm6 serve goods=runs/demo/model other=runs/other/model"),
        )

    desk.on(None, others, outputs=[second, alone])

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
        gr.HTML(heading(desk, name, known[0][name]), apply_default_css=False)
        asking = Form(desk, name, known[0][name])
        with gr.Row(elem_classes="buttons"):
            run = gr.Button(say("Run both"), variant="primary", elem_id="ask", min_width=80)
            fill = gr.Button(say("Example"), elem_id="example", min_width=80)
        asking.notes[""].render()
        with gr.Row(elem_id="answer"):
            answers = []
            for who, tasks in zip(sides, known, strict=True):
                with gr.Column(min_width=280):
                    answers.append(Answer(desk, tasks[name], who.replace(":", " · ")))

        async def ask(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            shown = [answer.nothing() for answer in answers]
            nothing = [value for answer in shown for value in answer]
            updates: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

            async def follow(number: int) -> None:
                try:
                    async for one in stream_answer(desk, request, sides[number], asking, answers[number], values):
                        updates.put_nowait((number, one))
                    updates.put_nowait((number, None))
                except BaseException as error:
                    updates.put_nowait((number, error))

            running = [asyncio.create_task(follow(number)) for number in range(2)]
            no_errors = desk.beside(asking.notes)
            try:
                left = 2
                while left:
                    yield [*no_errors, *(value for answer in shown for value in answer)]
                    number, found = await updates.get()
                    if isinstance(found, Exception):
                        yield [*desk.beside(asking.notes, desk.unforeseen(found)), *nothing]
                        return
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
        places, events = [*asking.notes.values(), *outputs], [run.click, *asking.enters]
        gr.on(events, None, None, None, js=LOOK, api_visibility="private")
        gr.on(events, ask, asking.inputs, places, api_visibility="private", show_progress="minimal")
        fill.click(asking.example, None, asking.fields, api_visibility="private")
