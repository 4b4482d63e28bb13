"""openm6 predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs, check_output, find_task
from openm6.cli.output import (
    Column,
    DecodingOption,
    Encoding,
    Format,
    Images,
    Json,
    Names,
    NoCache,
    Truncate,
    counted,
    emit,
    pairs,
)
from openm6.cli.work import decoding_options


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help=MODEL)],
    task: Annotated[str, typer.Argument(help="Task by name or YAML path.")],
    data: Annotated[str, typer.Option(help="Input records: CSV, JSON lines, Parquet, or another source.")],
    output: Annotated[Path, typer.Option(help="Output file: .csv, .jsonl or .parquet.")],
    column: Column = None,
    data_format: Format = None,
    encoding: Encoding = None,
    names: Names = None,
    images: Images = None,
    no_cache: NoCache = False,
    option: DecodingOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per batch.")] = 64,
    probabilities: Annotated[bool, typer.Option(help="Label tasks: add a column with all probabilities.")] = False,
    truncate: Truncate = None,
    json: Json = False,
) -> None:
    """Answer every record of a table and write the answers beside its columns. An interrupted run is resumed by the
    same command."""
    from openm6.data.writers import writer_for

    place = check_inputs(model, [task], [data])
    columns, decoding = pairs(column or []), decoding_options(option, find_task(place, task))
    writer_for(output)
    check_output(output)

    from openm6.data.readers import with_options
    from openm6.evaluate.predict import Prediction
    from openm6.inference.session import Session

    prediction = Prediction(
        Session.load(place), task, data, output, columns=columns, images=images,
        data_format=with_options(data_format, encoding, names), decoding=decoding, batch_size=batch_size,
        all_probabilities=probabilities, truncate=truncate,
    )  # fmt: skip
    asked = ", ".join(f"{slot} from {name}" for slot, name in prediction.view.mapping.items())
    typer.echo(f"{prediction.total} records: {asked}; new columns: {', '.join(prediction.added.values())}.", err=True)
    with counted("records") as on_progress:
        done = prediction.run(on_progress)
    if json:
        emit(done)
        return
    resumed = f", {done['resumed']} of them earlier" if done["resumed"] else ""
    typer.echo(f"{done['answered']} of {done['records']} records were answered{resumed}, in {done['seconds']:.0f} s.")
    if done["bad"]:
        typer.echo(f"{done['bad']} failed: see the column {prediction.added['error']} of {output}.")
