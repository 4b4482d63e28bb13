"""openm6 images: draw, edit, vary, extend, measure, batch, labels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from openm6.cli.output import (
    Column,
    Encoding,
    Format,
    Json,
    Names,
    NoCache,
    Truncate,
    emit,
    pairs,
    show_measures,
    table,
)
from openm6.cli.work import decoding_options
from openm6.core.files import require_writable

if TYPE_CHECKING:
    from PIL import Image

    from openm6.core.candidates import Candidate

images = typer.Typer(help="Pictures out: draw candidates, measure what a model draws.", no_args_is_help=True)
app.add_typer(images, name="images")

Model = Annotated[str, typer.Argument(help=MODEL)]
Slots = Annotated[list[str] | None, typer.Argument(help="slot=value of the task; a picture is a path.")]
Candidates = Annotated[int, typer.Option("--candidates", "-n", min=1, help="Pictures to choose the best of.")]
Folder = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Folder for the pictures.")]
Options = Annotated[list[str] | None, typer.Option("--option", "-o", help="Option of drawing, e.g. passes=12.")]
TaskName = Annotated[str, typer.Option(help="A task that draws, by name or YAML path.")]


def show(drawn: list[Candidate], output: Path, json: bool, follows: Mapping[str, list[float]] | None = None) -> None:
    """Save pictures under the next free numbers of a folder, 1.png, 2.png, ... in an empty one, and print what the
    model thinks of them; `follows`: log-odds that they show what each of several controls says."""
    rows: list[dict[str, Any]] = []
    for place, candidate in enumerate(drawn):
        file = _save_next(candidate.image, output)
        each = {f"follows {name}": odds[place] for name, odds in (follows or {}).items()}
        told = {"seed": candidate.seed, "uncertain": candidate.uncertain, "score": candidate.score}
        rows.append({"file": str(file), **told, **candidate.estimates, **each})
    if json:
        emit(rows)
        return
    table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    won, lost = ([n for n, odds in (follows or {}).items() if (odds[0] > 0) is side] for side in (True, False))
    if won and lost:
        best = Path(rows[0]["file"]).name
        typer.echo(f"The controls contradict each other: {best} follows {', '.join(won)}, not {', '.join(lost)}.")


def _save_next(image: Image.Image, folder: Path) -> Path:
    """Write a picture as NUMBER.png, by the number after the highest one there, and overwrite nothing."""
    from openm6.core.files import write_failed
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
            file.unlink()  # half a picture is none
            raise
        return file
    except OSError as error:
        raise write_failed(folder, error) from None


def _checked(model: str, task: str, slots: list[str] | None, *pictures: Path) -> tuple[Path, dict[str, Any]]:
    """The model's directory and the slots by name, after everything that was given was looked for."""
    place, asked = check_inputs(model, [task]), pairs(slots or [])
    find_task(place, task).check_draws()
    check_pictures(*pictures)
    return place, dict(asked)


@images.command()
def draw(
    model: Model,
    slots: Slots = None,
    task: TaskName = "text_to_image",
    candidates: Candidates = 8,
    output: Folder = Path("pictures"),
    option: Options = None,
    truncate: Truncate = None,
    json: Json = False,
) -> None:
    """Candidates for one wish, the best by the model's own estimates first: 1.png, 2.png, ..., or the numbers after
    those that are in the folder. Each is drawn again alone by its seed: -n 1 -o seed=NUMBER."""
    place, asked = _checked(model, task, slots)
    require_writable(output)
    check_slots(find_task(place, task), asked)
    options = decoding_options(option)

    from openm6.inference.session import Session

    session = Session.load(place)
    drawn = session.draw(task, candidates=candidates, decoding=options, truncate=truncate, **asked)
    follows = session.relevance_by_slot(task, drawn, truncate=truncate, **asked)
    show(drawn, output, json, follows if len(follows) > 1 else {})


@images.command()
def edit(
    model: Model,
    picture: Annotated[Path, typer.Option(help="The picture to change.")],
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the same size: what is transparent, or without an alpha channel white (grey value 128 or "
            "above), is drawn again; by default what is transparent in the picture."
        ),
    ] = None,
    slots: Slots = None,
    task: TaskName = "text_to_image",
    candidates: Candidates = 4,
    output: Folder = Path("pictures"),
    option: Options = None,
    json: Json = False,
) -> None:
    """Draw a part of a picture again: the pictures have its size, and outside of the mask its pixels and transparency.
    What the model draws of the square around the mask is scaled to that square."""
    place, asked = _checked(model, task, slots, *filter(None, (picture, mask)))
    require_writable(output)
    options = decoding_options(option)

    from openm6.inference.edit import edit as edit_picture
    from openm6.inference.session import Session

    found = edit_picture(Session.load(place), task, picture, mask, candidates=candidates, decoding=options, **asked)
    show(found, output, json)


@images.command()
def vary(
    model: Model,
    picture: Annotated[Path, typer.Option(help="The picture to vary.")],
    slots: Slots = None,
    task: TaskName = "text_to_image",
    share: Annotated[float, typer.Option(help="Of the picture's codes that are drawn again.")] = 0.6,
    candidates: Candidates = 4,
    output: Folder = Path("pictures"),
    option: Options = None,
    json: Json = False,
) -> None:
    """Pictures like a given one: of its middle square, at the size that the model draws."""
    place, asked = _checked(model, task, slots, picture)
    require_writable(output)
    options = decoding_options(option)

    from openm6.core.images import open_image
    from openm6.inference.edit import vary as vary_picture
    from openm6.inference.session import Session

    session, (width, height) = Session.load(place), open_image(picture).size
    found = vary_picture(session, task, picture, share=share, candidates=candidates, decoding=options, **asked)
    show(found, output, json)
    side = session.codec.size
    if (width, height) != (side, side):
        square, drawn = min(width, height), f"{side} x {side} pixels"
        taken = f"the middle square of {picture}, {square} of its {width} x {height} pixels"
        typer.echo(f"The pictures have {drawn}: {taken}, was taken.", err=True)


@images.command()
def extend(
    model: Model,
    picture: Annotated[Path, typer.Option(help="The picture to continue.")],
    side: Annotated[str, typer.Option(help="left, right, top or bottom.")],
    pixels: Annotated[int, typer.Option(help="How far beyond that side.")],
    slots: Slots = None,
    task: TaskName = "text_to_image",
    output: Annotated[Path, typer.Option(help="File for the picture; a PNG keeps the given pixels bit by bit.")] = Path(
        "picture.png"
    ),
    option: Options = None,
) -> None:
    """Continue a picture, at its own size, beyond one of its sides."""
    from openm6.core.images import open_image, save, seed_of_drawn

    place, asked = _checked(model, task, slots, picture)
    check_output(output, PICTURES)
    if open_image(picture, alpha=True).mode.endswith("A"):
        check_output(output, CLEAR)
    options = decoding_options(option)

    from openm6.inference.edit import extend as extend_picture
    from openm6.inference.session import Session

    found = extend_picture(Session.load(place), task, picture, side, pixels, decoding=options, **asked)
    output.parent.mkdir(parents=True, exist_ok=True)
    save(found, output)
    typer.echo(f"Seed: {seed_of_drawn(found)}.", err=True)
    typer.echo(str(output))


@images.command()
def measure(
    model: Model,
    judge: Annotated[str, typer.Option(help="Model directory of a judge (recipes/judge.yaml).")],
    data: Annotated[str, typer.Option(help="Real pictures, their captions and attributes.")] = "demo:studio/test",
    task: TaskName = "text_to_image",
    judge_task: Annotated[str, typer.Option(help="What the judge reads in a picture.")] = "product_attributes",
    candidates: Candidates = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on the first records only.")] = None,
    grid: Annotated[Path | None, typer.Option(help="PNG file for a sheet of drawn pictures.")] = None,
    option: Options = None,
    json: Json = False,
) -> None:
    """What a judge reads in drawn pictures, in real ones and in those that only went through the codec."""
    place, of_judge = check_inputs(model, [task], [data]), check_inputs(judge, [judge_task])
    if grid:
        check_output(grid, PICTURES)
    options = decoding_options(option)

    from openm6.evaluate.pictures import Judge, draw_sheet, measure_drawing, read_wishes
    from openm6.inference.session import Session

    session = Session.load(place)
    judging = Judge(Session.load(of_judge), judge_task)
    records, wanted = read_wishes(session, task, judging, data, limit)
    rows, drawn = measure_drawing(session, task, judging, records, wanted, candidates, options)
    if grid:
        draw_sheet(drawn, grid)
    if json:
        emit(rows)
        return
    show_measures(rows, f"{len(records)} pictures of {data}")


@images.command()
def batch(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(help="A file with a column for each slot of the task: JSONL, CSV, Parquet ..., or a text a line."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the page; one begun earlier goes on.")],
    task: TaskName = "text_to_image",
    candidates: Candidates = 8,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Of them that are kept, the best ones; by default 4, or all of fewer.")
    ] = None,
    column: Column = None,
    data_format: Format = None,
    encoding: Encoding = None,
    names: Names = None,
    no_cache: NoCache = False,
    option: Options = None,
    truncate: Truncate = None,
    json: Json = False,
) -> None:
    """The best of several candidates for every prompt of a file, and a page on which people accept or reject them."""
    place = check_inputs(model, [task], [prompts])
    require_writable(output)
    columns, options = pairs(column or []), decoding_options(option)

    from openm6.data.readers import with_options
    from openm6.inference.session import Session
    from openm6.studio.images import make_batch

    made = make_batch(
        Session.load(place), task, prompts, output, candidates=candidates, keep=keep, columns=columns, decoding=options,
        data_format=with_options(data_format, encoding, names), truncate=truncate,
    )  # fmt: skip
    if json:
        emit(made)
        return
    if made["bad"]:
        total = made["prompts"] + made["bad"]
        typer.echo(f"{made['bad']} of {total} prompts could not be used: see {output / 'rejects.jsonl'}.")
    if made["uncertain"]:
        typer.echo(
            f"Of {made['uncertain']} prompts the model does not find in the best picture what was asked for: see "
            f"`uncertain` in {output / 'candidates.jsonl'}."
        )
    typer.echo(
        f"{made['pictures']} pictures for {made['prompts']} prompts (seed {made['seed']}). To review: {made['page']}"
    )


@images.command()
def labels(
    output: Annotated[Path, typer.Argument(help="Folder of `openm6 images batch`.")],
    labels: Annotated[Path, typer.Argument(help="The labels.jsonl that its review page gave.")],
    json: Json = False,
) -> None:
    """People's verdicts as a source to train on, labelled.jsonl, and how much they accept."""
    from openm6.studio.images import write_labelled

    found = write_labelled(output, labels)
    if json:
        emit(found)
        return
    rows = [("all", found), *found["by_rank"].items()]
    table(["rank", "accepted", "pictures"], [[n, f"{r['accepted']:.1%}", r["labelled"]] for n, r in rows])
    typer.echo(f"To train on: {found['file']}")
