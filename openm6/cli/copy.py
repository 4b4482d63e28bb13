"""openm6 copy."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs
from openm6.cli.output import Column, Encoding, Format, Json, Names, NoCache, emit, pairs, table
from openm6.cli.work import decoding_options
from openm6.core.files import require_writable, whole_lines

copy = typer.Typer(help="Texts for many items, checked against their facts, reviewed by people.", no_args_is_help=True)
app.add_typer(copy, name="copy")

SHOWN = 5
"""Items that could not be used whose reasons are printed; all are in rejects.jsonl."""


@copy.command()
def batch(
    model: Annotated[str, typer.Argument(help=MODEL)],
    items: Annotated[str, typer.Option(help="A table of items: CSV, JSONL, Parquet ...; a row is an item.")],
    output: Annotated[Path, typer.Option(help="Folder for the texts and the page; one begun earlier goes on.")],
    task: Annotated[str, typer.Option(help="A task that writes one text.")] = "product_copy",
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Texts to choose the best of.")] = 4,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Of them that are kept, the best ones; by default 2, or all of fewer.")
    ] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="A word that never occurs; several times.")] = None,
    forbid_file: Annotated[Path | None, typer.Option(help="A file of such words, a line each.")] = None,
    least: Annotated[int, typer.Option("--min", min=0, help="Characters at least.")] = 0,
    most: Annotated[int, typer.Option("--max", min=0, help="Characters at most; 0: any number.")] = 0,
    facts: Annotated[
        bool, typer.Option(help="Refuse numbers, colours, materials and values of other items that an item has not.")
    ] = True,
    lexicon: Annotated[
        str | None,
        typer.Option(help="Other items, whose values are known too; or a YAML file for lexicon.yaml."),
    ] = None,
    id_column: Annotated[str, typer.Option("--id", help="Column with an item's id, the first of texts.csv.")] = "",
    columns: Annotated[
        str | None, typer.Option(help="Columns of the items in texts.csv, with commas between; else all but pictures.")
    ] = None,
    column: Column = None,
    data_format: Format = None,
    encoding: Encoding = None,
    names: Names = None,
    no_cache: NoCache = False,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Decoding option.")] = None,
    json: Json = False,
) -> None:
    """The best of several texts for every item, none that breaks a rule, and a page for people's verdicts."""
    from openm6.core.errors import UsageError

    place = check_inputs(model, [task], [items, lexicon])
    require_writable(output)
    mapping, decoding = pairs(column or []), decoding_options(option)
    words = list(forbid or [])
    if forbid_file:
        try:
            words += [line.strip() for line in forbid_file.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The words in {forbid_file} cannot be read ({type(error).__name__}).") from None
    from openm6.data.readers import with_options
    from openm6.inference.session import Session
    from openm6.studio.copy import make_copy

    made = make_copy(
        Session.load(place), task, items, output, candidates=candidates, keep=keep, columns=mapping,
        decoding=decoding, forbid=words, least=least, most=most, facts=facts,
        lexicon=lexicon, id_column=id_column, data_format=with_options(data_format, encoding, names),
        table=None if columns is None else [name.strip() for name in columns.split(",") if name.strip()],
    )  # fmt: skip
    if json:
        emit(made)
        return
    if made["bad"]:
        typer.echo(f"{made['bad']} items could not be used: see {output / 'rejects.jsonl'}.")
        for row in islice(whole_lines(output / "rejects.jsonl"), SHOWN):
            typer.echo(f"  {row['reason']}")
    if made["broken"]:
        table(["texts that broke a rule", "how many"], made["broken"].items())
    typer.echo(f"{made['texts']} texts for {made['items']} items ({made['empty']} have none): {made['table']}")
    if made["lexicon"]:
        typer.echo(f"Colours and materials: {made['lexicon']}")
    typer.echo(f"Review: {made['page']}")


@copy.command()
def labels(
    output: Annotated[Path, typer.Argument(help="Folder of `openm6 copy batch`.")],
    labels: Annotated[Path, typer.Argument(help="The labels.jsonl that its review page gave.")],
    json: Json = False,
) -> None:
    """The accepted texts as a source to train on, labelled.jsonl, edited ones as they were edited, and how much people
    accept."""
    from openm6.studio.copy import write_labelled_copy

    found = write_labelled_copy(output, labels)
    if json:
        emit(found)
        return
    rows = [("all", found), *found["by_rank"].items()]
    table(["rank", "accepted", "texts"], [[n, f"{r['accepted']:.1%}", r["labelled"]] for n, r in rows])
    if found["edited"]:
        typer.echo(f"{found['edited']:.1%} of the texts were edited and accepted.")
    typer.echo(f"To train on: {found['file']}")
