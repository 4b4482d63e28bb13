"""The page Fine-tune: submit, watch, stop and resume fine-tuning jobs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.context import PageContext, listing, note
from openm6.hub.catalogue import DATA, MODEL, find_model
from openm6.hub.jobs import OVER, RUNNING, Job, curve, output_of, progress
from openm6.train.finetune import RATES

TAIL = 4_000
"""Number of bytes of a log that are shown."""


def page(ui: PageContext) -> None:
    say = ui.say
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
        saved = gr.Markdown()
        keep_wrong = {"": note()}
    shown = [state, loss, log]

    def names(select: str | None = None) -> list[Any]:
        jobs = ui.jobs.list()[::-1]
        found = [(f"{ui.time(job.created)} · {job.name} · {say(job.state)}", job.id) for job in jobs]
        known = [value for _, value in found]
        value = select if select in known else known[0] if known else None
        text = say("There is no fine-tuning job yet. Choose the training data above and submit one.")
        return listing(found, value, text)

    def look(identity: str | None) -> list[Any]:
        return _look(ui, ui.jobs.get(identity)) if identity else ["", None, ""]

    def submitted(*values: Any) -> list[Any]:
        return names(ui.jobs.submit(_words(ui, *values), f"finetune {values[1]}").id)

    def job_of(identity: str | None) -> str:
        if not identity:
            raise ui.error("Choose a job first.")
        return identity

    def acting(what: Any) -> Any:
        def act(identity: str | None) -> list[Any]:
            what(job_of(identity))
            return names(identity)

        return act

    def keeping(identity: str | None, called: str) -> str:
        run, catalogue = output_of(ui.jobs.get(job_of(identity))), ui.catalogue
        if run is None or not (run / "model").is_dir():
            raise ui.error("This job has not produced a model.")
        if not called.strip():
            raise ui.error("The model needs a name in the catalogue.")
        version = catalogue.add_model(called.strip(), run / "model", made_of=catalogue.parents(run), run=run)
        return say("Saved to the catalogue as {name}.", name=version.full_name)

    jobs = [empty, whole, chosen]
    ui.on(None, lambda: [*_choices(ui), *names()], outputs=[base, task, data, validation, *jobs])
    ui.on(chosen.change, look, [chosen], shown, job_wrong, show_progress="hidden")
    given = [base, task, data, validation, method, steps, batch, output, more]
    ui.on([submit.click, output.submit, more.submit], submitted, given, jobs, wrong, manage=True)
    ui.on([keep.click, kept.submit], keeping, [chosen, kept], [saved], keep_wrong, manage=True)
    for button, what in ((stop, ui.jobs.stop), (resume, ui.jobs.resume), (remove, ui.jobs.remove)):
        ui.on(button.click, acting(what), [chosen], jobs, job_wrong, manage=True)
    tick = gr.Timer(2).tick
    ui.on(tick, lambda job: [*names(job), *look(job)], [chosen], [*jobs, *shown], show_progress="hidden")


def _choices(ui: PageContext) -> tuple[Any, Any, Any, Any]:
    """The dropdowns of base models, tasks, training and validation data: served models and the catalogue."""
    from openm6.tasks.library import get, names

    served = [(name, str(one.place.model)) for name, one in ui.server.fleet.deployments.items()]
    every = [*served, *((version.full_name, version.full_name) for version in ui.kept(MODEL))]
    tasks = sorted((ui.title(name, get(name).description), name) for name in names())
    data = [(version.full_name, version.about["source"]) for version in ui.kept(DATA)]
    return (
        gr.Dropdown(choices=every, value=every[0][1] if every else None), gr.Dropdown(choices=tasks, value="vqa"),
        gr.Dropdown(choices=data, value=data[0][1] if data else None), gr.Dropdown(choices=[("", ""), *data], value=""),
    )  # fmt: skip


def _words(
    ui: PageContext,
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
        raise ui.error("Choose the base model.", param="base")
    if not task:
        raise ui.error("Choose the task to train.", param="task")
    if not data:
        raise ui.error("Choose the training data: a data set or the path of a file.", param="data")
    try:
        options = shlex.split(more or "")
    except ValueError:
        raise ui.error("A quotation mark is missing in the extra options.") from None
    words = ["finetune", str(find_model(base)[0]), "--task", task, "--data", data, "--method", method]
    words += ["--steps", str(int(steps))] if steps else []
    words += ["--batch-size", str(int(batch))] if batch else []
    words += ["--validation", validation] if validation else []
    words += ["--output", output or str(Path("runs") / f"finetune-{Path(task).stem}")]
    return [*words, *options]


def _look(ui: PageContext, job: Job) -> list[Any]:
    import pandas as pd

    say, far = ui.say, progress(job)
    parts = [f"**{say(job.state)}**"]
    if far:
        parts.append(
            say("step {step} of {steps}, loss {loss}", step=far["step"], steps=far["steps"], loss=f"{far['loss']:.3f}")
        )
        if job.state == RUNNING:
            parts.append(say("{minutes} min left", minutes=f"{far['seconds_left'] / 60:.1f}"))
    if job.state in OVER and job.message:
        parts.append(f"`{job.message.replace('`', chr(39))}`")
    command = shlex.join(job.words).replace(f"{job.folder}/", "")  # its working directory
    # A numeric dtype even without rows: otherwise Gradio keeps treating the columns as text.
    points = pd.DataFrame(curve(job), columns=["step", "loss"], dtype=float)
    state = " · ".join(parts) + "\n\n" + f"`openm6 {command}`".replace("``", "'")
    return [state, points, ui.jobs.last_said(job, TAIL)]
