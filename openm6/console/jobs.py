"""Teach: a fine-tuning is put into the queue, watched, stopped and gone on with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.desk import Desk, refusal
from openm6.hub.catalogue import DATA, MODEL
from openm6.hub.find import find_model
from openm6.hub.jobs import OVER, RUNNING, Job, curve, output_of, progress
from openm6.train.finetune import RATES

TAIL = 4_000
"""Bytes of a log that are shown."""


def page(desk: Desk) -> None:
    say = desk.say
    with gr.Accordion(say("Teach a model a task"), open=True):
        with gr.Row():
            base = gr.Dropdown(label=say("Start from"), allow_custom_value=True, elem_id="base")
            task = gr.Dropdown(label=say("Task"), allow_custom_value=True, elem_id="task")
        with gr.Row():
            data = gr.Dropdown(label=say("Learn from"), allow_custom_value=True, elem_id="learn-from")
            validation = gr.Dropdown(label=say("Measure on, to stop in time"), allow_custom_value=True)
        with gr.Row():
            method = gr.Dropdown(list(RATES), value="lora", label=say("Method"))
            steps = gr.Number(200, precision=0, minimum=1, label=say("Steps"), elem_id="steps")
            batch = gr.Number(16, precision=0, minimum=1, label=say("Examples a step"))
            output = gr.Textbox(label=say("Folder"), placeholder="runs/finetune-...", elem_id="folder")
        more = gr.Textbox(label=say("More options of openm6 finetune"), placeholder="--column text=body adapt.rank=16")
        submit = gr.Button(say("Put into the queue"), variant="primary", elem_id="submit")
    chosen = gr.Dropdown(label=say("Job"), interactive=True, elem_id="job")
    with gr.Row():
        stop = gr.Button(say("Stop"), elem_id="stop")
        resume = gr.Button(say("Go on"), elem_id="resume")
        remove = gr.Button(say("Forget"), elem_id="forget")
        kept = gr.Textbox(
            show_label=False, placeholder=say("name in the catalogue"), container=False, elem_id="kept-name"
        )
        keep = gr.Button(say("Keep the model"), elem_id="keep")
    state = gr.Markdown(elem_id="state")
    loss = gr.LinePlot(x="step", y="loss", height=280, label=say("Loss"), elem_id="curve")
    log = gr.Textbox(label=say("What it says"), lines=8, max_lines=16, interactive=False, autoscroll=True)
    shown = [state, loss, log]

    def names(select: str | None) -> Any:
        jobs = desk.jobs.list()[::-1]
        found = [(f"{job.id[4:-5]} · {job.name} · {say(job.state)}", job.id) for job in jobs]
        known = [value for _, value in found]
        return gr.Dropdown(choices=found, value=select if select in known else known[0] if known else None)

    async def opened(request: gr.Request, select: str | None) -> Any:
        desk.key(request)
        return await desk.do(lambda: (*_choices(desk), names(select)))

    async def look(request: gr.Request, identity: str | None) -> Any:
        desk.key(request)
        if not identity:
            return ["", None, ""]
        return await desk.do(lambda: _look(desk, desk.jobs.get(identity)))

    async def tick(request: gr.Request, identity: str | None) -> Any:
        return [await desk.do(lambda: names(identity)), *await look(request, identity)]

    async def submitted(request: gr.Request, *values: Any) -> Any:
        desk.manager(request)
        job = await desk.do(lambda: desk.jobs.submit(_words(*values), desk.say("fine-tuning")))
        return names(job.id)

    def acting(what: Any) -> Any:
        async def act(request: gr.Request, identity: str | None) -> Any:
            desk.manager(request)
            if identity:
                await desk.do(lambda: what(identity))
            return names(identity)

        return act

    async def keeping(request: gr.Request, identity: str | None, called: str) -> None:
        desk.manager(request)
        if not identity:
            return
        run = output_of(desk.jobs.get(identity))
        if run is None or not (run / "model").is_dir():
            raise refusal(say("This job has made no model."))
        catalogue = desk.catalogue
        made_of = await desk.do(lambda: catalogue.parents(run))
        version = await desk.do(lambda: catalogue.add_model(called.strip(), run / "model", made_of=made_of, run=run))
        gr.Info(say("It is {name} in the catalogue.", name=version.full_name))

    gr.on(None, opened, chosen, [base, task, data, validation, chosen], api_visibility="private")
    chosen.change(look, chosen, shown, api_visibility="private", show_progress="hidden")
    given = [base, task, data, validation, method, steps, batch, output, more]
    submit.click(submitted, given, chosen, api_visibility="private")
    keep.click(keeping, [chosen, kept], None, api_visibility="private")
    for button, what in ((stop, desk.jobs.stop), (resume, desk.jobs.resume), (remove, desk.jobs.remove)):
        button.click(acting(what), chosen, chosen, api_visibility="private")
    gr.Timer(2).tick(tick, chosen, [chosen, *shown], api_visibility="private", show_progress="hidden")


def _choices(desk: Desk) -> tuple[Any, Any, Any, Any]:
    """What can be begun from, taught and learned from: what is served and what the catalogue has."""
    from openm6.tasks.library import names

    served = [(name, str(one.place.model)) for name, one in desk.server.fleet.deployments.items()]
    every = [*served, *((version.full_name, version.full_name) for version in desk.kept(MODEL))]
    data = [(version.full_name, version.about["source"]) for version in desk.kept(DATA)]
    return (
        gr.Dropdown(choices=every, value=every[0][1] if every else None), gr.Dropdown(choices=names(), value="vqa"),
        gr.Dropdown(choices=data, value=data[0][1] if data else None), gr.Dropdown(choices=[("", ""), *data], value=""),
    )  # fmt: skip


def _words(
    base: str, task: str, data: str, validation: str, method: str, steps: float, batch: float, output: str, more: str
) -> list[str]:
    """The command of a fine-tuning."""
    words = ["finetune", str(find_model(base or "")[0]), "--task", task or "", "--data", data or "", "--method", method]
    words += ["--steps", str(int(steps)), "--batch-size", str(int(batch))]
    words += ["--validation", validation] if validation else []
    words += ["--output", output or str(Path("runs") / f"finetune-{task}")]
    return [*words, *shlex.split(more or "")]


def _look(desk: Desk, job: Job) -> list[Any]:
    import pandas as pd

    say, far = desk.say, progress(job)
    told = [f"**{say(job.state)}**"]
    if far:
        told.append(
            say("step {step} of {steps}, loss {loss}", step=far["step"], steps=far["steps"], loss=f"{far['loss']:.3f}")
        )
        if job.state == RUNNING:
            told.append(say("{minutes} min left", minutes=f"{far['seconds_left'] / 60:.1f}"))
    if job.state in OVER and job.message:
        told.append(f"`{job.message.replace('`', chr(39))}`")
    told.append(f"`openm6 {shlex.join(job.words)}`".replace("``", "'"))
    points = pd.DataFrame(curve(job), columns=["step", "loss"])
    return [" · ".join(told), points, desk.jobs.last_said(job, TAIL)]
