"""openm6 images: draw, edit, vary, extend, measure, batch, labels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.checks import (
    CLEAR,
    MODEL,
    PICTURES,
    check_inputs,
    check_output,
    check_pictures,
    check_slots,
    find_task,
)
from openm6.cli.output import counted, emit, pairs, show_acceptance, show_measures, table
from openm6.cli.work import decoding_options
from openm6.core.files import require_writable, write_failed

if TYPE_CHECKING:
    from PIL import Image

    from openm6.core.candidates import Candidate

images = typer.Typer(help="Image generation: draw, edit, vary, extend, in batches; evaluate.", no_args_is_help=True)
app.add_typer(images, name="images")

Model = Annotated[str, typer.Argument(help=MODEL)]
Slots = Annotated[list[str] | None, typer.Argument(help="Inputs of the task, slot=value; a picture is a path.")]
Candidates = Annotated[int, typer.Option("--candidates", "-n", min=1, help="Number of candidates per prompt.")]
Folder = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Output folder.")]
TaskName = Annotated[str, typer.Option(help="A task that draws, by name or YAML path.")]


def show(drawn: list[Candidate], output: Path, json: bool, follows: Mapping[str, list[float]] | None = None) -> None:
    """Save pictures under the next free numbers of a folder (1.png, 2.png, ... in an empty one) and print the model's
    estimates. `follows`: log-odds that they show what each of several controls says."""
    rows: list[dict[str, Any]] = []
    for place, candidate in enumerate(drawn):
        file = save_next(candidate.image, output)
        each = {f"follows {name}": odds[place] for name, odds in (follows or {}).items()}
        details = {"seed": candidate.seed, "uncertain": candidate.uncertain, "score": candidate.score}
        rows.append({"file": str(file), **details, **candidate.estimates, **each})
    if json:
        emit(rows)
        return
    table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    won, lost = ([n for n, odds in (follows or {}).items() if (odds[0] > 0) is side] for side in (True, False))
    if won and lost:
        best = Path(rows[0]["file"]).name
        typer.echo(f"The controls contradict each other: {best} follows {', '.join(won)}, not {', '.join(lost)}.")


def save_next(image: Image.Image, folder: Path) -> Path:
    """Write a picture as N.png, one above the highest number in the folder, without overwriting a file."""
    from openm6.core.images import png

    content = png(image)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()), default=0)
        while True:
            number += 1
            file = folder / f"{number}.png"
            with suppress(FileExistsError):
                file.touch(exist_ok=False)
                break
        try:
            file.write_bytes(content)
        except OSError:
            file.unlink()  # incomplete
            raise
        return file
    except OSError as error:
        raise write_failed(folder, error) from None


def _checked(
    model: str, task: str, slots: list[str] | None, option: list[str] | None, *pictures: Path | None
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The model's directory, the values by slot and the decoding options, after checking that model, task and pictures
    exist."""
    place, asked = check_inputs(model, [task]), pairs(slots or [])
    find_task(place, task).check_draws()
    check_pictures(*filter(None, pictures))
    return place, dict(asked), decoding_options(option)


@images.command()
def draw(
    model: Model,
    slots: Slots = None,
    task: TaskName = "text_to_image",
    candidates: Candidates = 8,
    output: Folder = Path("pictures"),
    option: options.DecodingOption = None,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Draw candidates for a prompt, ranked by the model's own estimates, as N.png under the next free numbers of the
    folder. A candidate can be redrawn from its seed: -n 1 -o seed=NUMBER."""
    place, asked, decoding = _checked(model, task, slots, option)
    require_writable(output)
    check_slots(find_task(place, task), asked)

    from openm6.inference.session import Session

    session = Session.load(place)
    drawn = session.draw(task, candidates=candidates, decoding=decoding, truncate=truncate, **asked)
    follows = session.relevance_by_slot(task, drawn, truncate=truncate, **asked)
    show(drawn, output, json, follows if len(follows) > 1 else {})


@images.command()
def edit(
    model: Model,
    picture: Annotated[Path, typer.Option(help="Picture to edit.")],
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the same size whose transparent pixels (without an alpha channel: white ones, grey value "
            "128 or above) are redrawn. Default: the transparent pixels of the picture."
        ),
    ] = None,
    slots: Slots = None,
    task: TaskName = "text_to_image",
    candidates: Candidates = 4,
    output: Folder = Path("pictures"),
    option: options.DecodingOption = None,
    json: options.Json = False,
) -> None:
    """Redraw a region of a picture (inpainting): size, pixels outside the mask and transparency stay. The model draws
    the square around the mask, which is scaled into place."""
    place, asked, decoding = _checked(model, task, slots, option, picture, mask)
    require_writable(output)

    from openm6.inference.edit import edit as edit_picture
    from openm6.inference.session import Session

    found = edit_picture(Session.load(place), task, picture, mask, candidates=candidates, decoding=decoding, **asked)
    show(found, output, json)


@images.command()
def vary(
    model: Model,
    picture: Annotated[Path, typer.Option(help="Picture to vary.")],
    slots: Slots = None,
    task: TaskName = "text_to_image",
    fraction: Annotated[float, typer.Option(help="Fraction of the picture's codes to redraw, 0 to 1.")] = 0.6,
    candidates: Candidates = 4,
    output: Folder = Path("pictures"),
    option: options.DecodingOption = None,
    json: options.Json = False,
) -> None:
    """Draw variations of a picture: of its central square, at the model's resolution."""
    place, asked, decoding = _checked(model, task, slots, option, picture)
    require_writable(output)

    from openm6.core.images import open_image
    from openm6.inference.edit import vary as vary_picture
    from openm6.inference.session import Session

    session, (width, height) = Session.load(place), open_image(picture).size
    found = vary_picture(session, task, picture, fraction=fraction, candidates=candidates, decoding=decoding, **asked)
    show(found, output, json)
    side = session.codec.size
    if (width, height) != (side, side):
        text = f"{picture} ({width} x {height}) was cropped to its central square of {min(width, height)} pixels"
        typer.echo(f"{text}; the variations have {side} x {side}.", err=True)


@images.command()
def extend(
    model: Model,
    picture: Annotated[Path, typer.Option(help="Picture to extend.")],
    side: Annotated[str, typer.Option(help="Side to extend: left, right, top or bottom.")],
    pixels: Annotated[int, typer.Option(help="Width of the extension in pixels.")],
    slots: Slots = None,
    task: TaskName = "text_to_image",
    output: Annotated[Path, typer.Option(help="Output file; a PNG keeps the given pixels exactly.")] = Path(
        "picture.png"
    ),
    option: options.DecodingOption = None,
) -> None:
    """Extend a picture beyond one of its sides (outpainting), at its own resolution."""
    from openm6.core.images import open_image, save, seed_of_drawn

    place, asked, decoding = _checked(model, task, slots, option, picture)
    check_output(output, CLEAR if open_image(picture, alpha=True).mode.endswith("A") else PICTURES)

    from openm6.inference.edit import extend as extend_picture
    from openm6.inference.session import Session

    found = extend_picture(Session.load(place), task, picture, side, pixels, decoding=decoding, **asked)
    output.parent.mkdir(parents=True, exist_ok=True)
    save(found, output)
    typer.echo(f"Seed: {seed_of_drawn(found)}.", err=True)
    typer.echo(str(output))


@images.command()
def measure(
    model: Model,
    judge: Annotated[str, typer.Option(help="Judge model (recipe judge): directory or model of the catalogue.")],
    data: Annotated[str, typer.Option(help="Real pictures with captions and attributes.")] = "demo:studio/test",
    task: TaskName = "text_to_image",
    judge_task: Annotated[str, typer.Option(help="The judge's task on a picture.")] = "product_attributes",
    candidates: Candidates = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of records to use, the first ones.")] = None,
    grid: Annotated[Path | None, typer.Option(help="PNG file for a contact sheet of generated pictures.")] = None,
    option: options.DecodingOption = None,
    json: options.Json = False,
) -> None:
    """Evaluate generated pictures by a judge model, beside real and reconstructed ones."""
    if grid:
        check_output(grid, PICTURES)
    of_judge, place = check_inputs(judge, [judge_task]), check_inputs(model, [task], [data])
    decoding = decoding_options(option)

    from openm6.evaluate.pictures import Judge, draw_sheet, measure_drawing, read_prompts
    from openm6.inference.session import Session

    session = Session.load(place)
    judging = Judge(Session.load(of_judge), judge_task)
    records, wanted = read_prompts(session, task, judging, data, limit)
    rows, drawn = measure_drawing(session, task, judging, records, wanted, candidates, decoding)
    if grid:
        draw_sheet(drawn, grid)
    emit(rows) if json else show_measures(rows, f"{len(records)} pictures of {data}")


@images.command()
@options.reads_data("images")
def batch(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(help="Data with a column per slot of the task (JSONL, CSV, Parquet ...), or one text per line."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for pictures and review page; an interrupted batch is resumed.")],
    task: TaskName = "text_to_image",
    candidates: Candidates = 8,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Best candidates to keep per prompt. Default: 4, at most --candidates.")
    ] = None,
    reading: options.Reading = options.AUTOMATIC,
    option: options.DecodingOption = None,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Draw several candidates per prompt of a file, keep the best, and make a page to review them."""
    place = check_inputs(model, [task], [prompts])
    require_writable(output)
    decoding = decoding_options(option)

    from openm6.inference.session import Session
    from openm6.studio.images import make_batch

    with counted("prompts") as on_progress:
        made = make_batch(
            Session.load(place), task, prompts, output, candidates=candidates, keep=keep, columns=reading.columns,
            decoding=decoding, data_format=reading.format, truncate=truncate,
            on_progress=on_progress,
        )  # fmt: skip
    if json:
        emit(made)
        return
    if made["bad"]:
        total = made["prompts"] + made["bad"]
        typer.echo(f"{made['bad']} of {total} prompts could not be used: see {output / 'rejects.jsonl'}.")
    if made["uncertain"]:
        typer.echo(
            f"For {made['uncertain']} prompts the model does not recognize the prompt in the best picture: see "
            f"`uncertain` in {output / 'candidates.jsonl'}."
        )
    typer.echo(
        f"{made['pictures']} pictures for {made['prompts']} prompts (seed {made['seed']}). To review: {made['page']}"
    )


@images.command()
def labels(
    output: Annotated[Path, typer.Argument(help="Folder of `openm6 images batch`.")],
    labels: Annotated[Path, typer.Argument(help="labels.jsonl, downloaded from its review page.")],
    json: options.Json = False,
) -> None:
    """Write the human labels as training data (labelled.jsonl), and print the acceptance rate."""
    from openm6.studio.images import write_labelled

    show_acceptance(write_labelled(output, labels), "pictures", json)
