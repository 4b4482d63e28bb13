"""The page Fine-tune: submit, watch, stop and resume fine-tuning jobs."""

from __future__ import annotations

import shlex
from asyncio import to_thread
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.desk import Desk, first_step, note
from openm6.hub.catalogue import DATA, MODEL
from openm6.hub.find import find_model
from openm6.hub.jobs import OVER, RUNNING, Job, curve, output_of, progress
from openm6.train.finetune import RATES

TAIL = 4_000
"""Number of bytes of a log that are shown."""


def page(desk: Desk) -> None:
    say = desk.say
    with gr.Row():
        with gr.Column(min_width=240):
            base = gr.Dropdown(label=say("Base model"), allow_custom_value=True, elem_id="base")
            base_note = note()
            data = gr.Dropdown(label=say("Training data"), allow_custom_value=True, elem_id="learn-from")
            data_note = note()
        with gr.Column(min_width=240):
            task = gr.Dropdown(label=say("Task"), allow_custom_value=True, elem_id="task")
            task_note = note()
            validation = gr.Dropdown(label=say("Validation data (for early stopping)"), allow_custom_value=True)
    with gr.Accordion(say("Options"), open=False):
        with gr.Row():
            method = gr.Dropdown(list(RATES), value="lora", label=say("Method"))
            steps = gr.Number(200, precision=0, minimum=1, label=say("Steps"), elem_id="steps")
            batch = gr.Number(16, precision=0, minimum=1, label=say("Batch size"))
            output = gr.Textbox(label=say("Output folder"), placeholder="runs/finetune-...", elem_id="folder")
        more = gr.Textbox(label=say("More options of openm6 finetune"), placeholder="--column text=body adapt.rank=16")
    submit = gr.Button(say("Submit"), variant="primary", elem_id="submit")
    wrong = {"base": base_note, "data": data_note, "task": task_note, "": note()}
    empty = gr.HTML(apply_default_css=False)
    with gr.Column(visible=False) as whole:
        chosen = gr.Dropdown(label=say("Job"), interactive=True, elem_id="job")
        state = gr.Markdown(elem_id="state")
        with gr.Row(elem_classes="buttons"):
            stop = gr.Button(say("Stop"), elem_id="stop", min_width=80)
            resume = gr.Button(say("Resume"), elem_id="resume", min_width=80)
            remove = gr.Button(say("Remove"), elem_id="forget", min_width=80)
        job_wrong = {"": note()}
        loss = gr.LinePlot(
            x="step", y="loss", x_title=say("Steps"), y_title=" ", height=240, title=say("Loss"), elem_id="curve"
        )
        log = gr.Textbox(label=say("Log"), lines=6, max_lines=16, interactive=False, autoscroll=True)
        with gr.Row(elem_classes="buttons", equal_height=True):
            kept = gr.Textbox(
                label=say("Name in the catalogue"), placeholder="goods", min_width=160, elem_id="kept-name"
            )
            keep = gr.Button(say("Save the model"), elem_id="keep", min_width=120)
        text = gr.Markdown()
        keep_wrong = {"": note()}
    shown = [state, loss, log]

    def names(select: str | None) -> Any:
        jobs = desk.jobs.list()[::-1]
        found = [(f"{desk.time(job.created)} · {job.name} · {say(job.state)}", job.id) for job in jobs]
        known = [value for _, value in found]
        value = select if select in known else known[0] if known else None
        text = say("There is no fine-tuning job yet. Choose the training data above and submit one.")
        return [
            "" if jobs else first_step(text), gr.Column(visible=bool(jobs)), gr.Dropdown(choices=found, value=value),
        ]  # fmt: skip

    async def opened(request: gr.Request) -> Any:
        desk.key(request)
        return [*await to_thread(_choices, desk), *await to_thread(names, None)]

    async def look(request: gr.Request, identity: str | None) -> Any:
        desk.key(request)
        if not identity:
            return ["", None, ""]
        return await to_thread(lambda: _look(desk, desk.jobs.get(identity)))

    async def tick(request: gr.Request, identity: str | None) -> Any:
        return [*await to_thread(names, identity), *await look(request, identity)]

    async def submitted(request: gr.Request, *values: Any) -> Any:
        desk.manager(request)
        words = await to_thread(_words, desk, *values)
        job = await to_thread(desk.jobs.submit, words, f"finetune {values[1]}")
        return await to_thread(names, job.id)

    def job_of(identity: str | None) -> str:
        if not identity:
            raise desk.error("Choose a job first.")
        return identity

    def acting(what: Any) -> Any:
        async def act(request: gr.Request, identity: str | None) -> Any:
            desk.manager(request)
            await to_thread(what, job_of(identity))
            return await to_thread(names, identity)

        return act

    async def keeping(request: gr.Request, identity: str | None, called: str) -> str:
        desk.manager(request)
        run, catalogue = output_of(desk.jobs.get(job_of(identity))), desk.catalogue
        if run is None or not (run / "model").is_dir():
            raise desk.error("This job has not produced a model.")
        if not called.strip():
            raise desk.error("The model needs a name in the catalogue.")
        made_of = await to_thread(catalogue.parents, run)
        version = await to_thread(lambda: catalogue.add_model(called.strip(), run / "model", made_of=made_of, run=run))
        return say("Saved to the catalogue as {name}.", name=version.full_name)

    jobs = [empty, whole, chosen]
    desk.on(None, opened, outputs=[base, task, data, validation, *jobs])
    desk.on(chosen.change, look, [chosen], shown, job_wrong, show_progress="hidden")
    given = [base, task, data, validation, method, steps, batch, output, more]
    desk.on([submit.click, output.submit, more.submit], submitted, given, jobs, wrong)
    desk.on([keep.click, kept.submit], keeping, [chosen, kept], [text], keep_wrong)
    for button, what in ((stop, desk.jobs.stop), (resume, desk.jobs.resume), (remove, desk.jobs.remove)):
        desk.on(button.click, acting(what), [chosen], jobs, job_wrong)
    desk.on(gr.Timer(2).tick, tick, [chosen], [*jobs, *shown], show_progress="hidden")


def _choices(desk: Desk) -> tuple[Any, Any, Any, Any]:
    """The dropdowns of base models, tasks, training and validation data: served models and the catalogue."""
    from openm6.tasks.library import get, names

    served = [(name, str(one.place.model)) for name, one in desk.server.fleet.deployments.items()]
    every = [*served, *((version.full_name, version.full_name) for version in desk.kept(MODEL))]
    tasks = sorted((desk.title(name, get(name).description), name) for name in names())
    data = [(version.full_name, version.about["source"]) for version in desk.kept(DATA)]
    return (
        gr.Dropdown(choices=every, value=every[0][1] if every else None), gr.Dropdown(choices=tasks, value="vqa"),
        gr.Dropdown(choices=data, value=data[0][1] if data else None), gr.Dropdown(choices=[("", ""), *data], value=""),
    )  # fmt: skip


def _words(
    desk: Desk,
    base: str | None,
    task: str | None,
    data: str | None,
    validation: str | None,
    method: str,
    steps: float | None,
    batch: float | None,
    output: str,
    more: str,
) -> list[str]:
    """The words of a fine-tuning command. Raises OpenM6Error that names the field."""
    if not base:
        raise desk.error("Choose the base model.", param="base")
    if not task:
        raise desk.error("Choose the task to train.", param="task")
    if not data:
        raise desk.error("Choose the training data: a data set or the path of a file.", param="data")
    try:
        options = shlex.split(more or "")
    except ValueError:
        raise desk.error("A quotation mark is missing in the extra options.") from None
    words = ["finetune", str(find_model(base)[0]), "--task", task, "--data", data, "--method", method]
    words += ["--steps", str(int(steps))] if steps else []
    words += ["--batch-size", str(int(batch))] if batch else []
    words += ["--validation", validation] if validation else []
    words += ["--output", output or str(Path("runs") / f"finetune-{Path(task).stem}")]
    return [*words, *options]


def _look(desk: Desk, job: Job) -> list[Any]:
    import pandas as pd

    say, far = desk.say, progress(job)
    text = [f"**{say(job.state)}**"]
    if far:
        text.append(
            say("step {step} of {steps}, loss {loss}", step=far["step"], steps=far["steps"], loss=f"{far['loss']:.3f}")
        )
        if job.state == RUNNING:
            text.append(say("{minutes} min left", minutes=f"{far['seconds_left'] / 60:.1f}"))
    if job.state in OVER and job.message:
        text.append(f"`{job.message.replace('`', chr(39))}`")
    command = shlex.join(job.words).replace(f"{job.folder}/", "")  # its working directory
    # A numeric dtype even without rows: otherwise Gradio keeps treating the columns as text.
    points = pd.DataFrame(curve(job), columns=["step", "loss"], dtype=float)
    state = " · ".join(text) + "\n\n" + f"`openm6 {command}`".replace("``", "'")
    return [state, points, desk.jobs.last_said(job, TAIL)]
