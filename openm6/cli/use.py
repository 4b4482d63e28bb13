"""openm6 run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, PICTURES, check_inputs, check_output, check_slots, find_task
from openm6.cli.options import Json, Truncate
from openm6.cli.output import emit, pairs
from openm6.cli.work import decoding_options


@app.command()
def run(
    model: Annotated[str, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Argument(help="A task by name or YAML path.")],
    slots: Annotated[list[str] | None, typer.Argument(help="slot=value; a picture is a path.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Decoding option, e.g. temperature=0.8.")
    ] = None,
    output: Annotated[Path, typer.Option(help="File for an answer that is a picture.")] = Path("picture.png"),
    examples: Annotated[str | None, typer.Option(help="Data with a few records and answers, to show how.")] = None,
    truncate: Truncate = None,
    json: Json = False,
) -> None:
    """One answer: `openm6 run runs/demo/model vqa photo=a.jpg question=这是什么商品?`"""
    place = check_inputs(model, [task], [examples])
    asked: dict[str, Any] = dict(pairs(slots or []))
    chosen = find_task(place, task)
    check_slots(chosen, asked)
    decoding = decoding_options(option, chosen)
    if chosen.draws:
        check_output(output, PICTURES)

    from openm6.core.images import save, seed_of_drawn
    from openm6.data.columns import SlotView
    from openm6.data.source import open_source
    from openm6.inference.labels import closed_labels
    from openm6.inference.modes import mode_of
    from openm6.inference.request import Request
    from openm6.inference.session import Session

    session, shown = Session.load(place), list[Any]()
    chosen = session.task(task)
    if examples:
        records = open_source(examples)
        shown = [SlotView.of(chosen, records)(record) for record in records]
    answer, beside = session.run(task, decoding=decoding, examples=shown, truncate=truncate, **asked), {}
    result = mode_of(chosen).result
    if result == "picture":
        output.parent.mkdir(parents=True, exist_ok=True)
        save(answer, output)
        beside = {"seed": seed_of_drawn(answer)}
        typer.echo(f"Seed: {beside['seed']}.", err=True)
        answer = str(output)
    elif result == "vector":
        answer = [round(float(number), 6) for number in answer]
    if json:
        fields = {"task": task, "answer": answer, "trained": session.is_trained_on(chosen), **beside}
        request = Request(asked, shown, truncate=truncate)
        if truncate:
            fields["truncated"] = session.prompt(chosen, request).cut
        if closed_labels(chosen):
            found = next(session.label_probabilities(task, [request]))
            fields["probabilities"] = dict(sorted(found.items(), key=lambda pair: -pair[1]))
        emit(fields)
    elif isinstance(answer, dict):
        for name, value in answer.items():
            typer.echo(f"{name}: {value}")
    else:
        typer.echo(answer)
