"""openm6 copy."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs
from openm6.cli.output import counted, emit, pairs, show_acceptance, table
from openm6.cli.work import decoding_options
from openm6.core.files import require_writable, whole_lines

copy = typer.Typer(help="Generate product copy in batches, check its facts, review it.", no_args_is_help=True)
app.add_typer(copy, name="copy")

SHOWN = 5
"""Number of rejected items whose reasons are printed; rejects.jsonl has all."""


@copy.command()
def batch(
    model: Annotated[str, typer.Argument(help=MODEL)],
    items: Annotated[str, typer.Option(help="Table with one item per row: CSV, JSONL, Parquet ...")],
    output: Annotated[Path, typer.Option(help="Folder for texts and review page; an interrupted batch is resumed.")],
    task: Annotated[str, typer.Option(help="A task with one text as its output.")] = "product_copy",
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Candidates per item.")] = 4,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Best candidates to keep per item. Default: 2, at most --candidates.")
    ] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="Forbidden word; repeatable.")] = None,
    forbid_file: Annotated[Path | None, typer.Option(help="UTF-8 file with one forbidden word per line.")] = None,
    least: Annotated[int, typer.Option("--min", min=0, help="Minimum length in characters.")] = 0,
    most: Annotated[int, typer.Option("--max", min=0, help="Maximum length in characters; 0: no limit.")] = 0,
    facts: Annotated[
        bool,
        typer.Option(help="Reject numbers, colours, materials and other items' values that the item does not have."),
    ] = True,
    lexicon: Annotated[
        str | None,
        typer.Option(help="More items whose values are checked, or a YAML file that replaces lexicon.yaml."),
    ] = None,
    id_column: Annotated[str, typer.Option("--id", help="Column with the item's id, the first of texts.csv.")] = "",
    columns: Annotated[
        str | None, typer.Option(help="Comma-separated columns for texts.csv. Default: all but pictures.")
    ] = None,
    column: options.Column = None,
    data_format: options.Format = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    no_cache: options.NoCache = False,
    option: options.DecodingOption = None,
    json: options.Json = False,
) -> None:
    """Write several texts per item, keep the best that break no rule, and make a page to review them."""
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

    with counted("items") as on_progress:
        made = make_copy(
            Session.load(place), task, items, output, candidates=candidates, keep=keep, columns=mapping,
            decoding=decoding, forbid=words, least=least, most=most, facts=facts,
            lexicon=lexicon, id_column=id_column, data_format=with_options(data_format, encoding, names),
            table=None if columns is None else [name.strip() for name in columns.split(",") if name.strip()],
            on_progress=on_progress,
        )  # fmt: skip
    if json:
        emit(made)
        return
    if made["bad"]:
        typer.echo(f"{made['bad']} items could not be used: see {output / 'rejects.jsonl'}.")
        for row in islice(whole_lines(output / "rejects.jsonl"), SHOWN):
            typer.echo(f"  {row['reason']}")
    if made["broken"]:
        table(["broken rule", "texts"], made["broken"].items())
    typer.echo(f"{made['texts']} texts for {made['items']} items ({made['empty']} without text): {made['table']}")
    if made["lexicon"]:
        typer.echo(f"Lexicon of colours and materials: {made['lexicon']}")
    typer.echo(f"Review: {made['page']}")


@copy.command()
def labels(
    output: Annotated[Path, typer.Argument(help="Folder of `openm6 copy batch`.")],
    labels: Annotated[Path, typer.Argument(help="labels.jsonl, downloaded from its review page.")],
    json: options.Json = False,
) -> None:
    """Write the accepted texts, as edited, as training data (labelled.jsonl), and print the acceptance rate."""
    from openm6.studio.copy import write_labelled_copy

    found = write_labelled_copy(output, labels)
    show_acceptance(found, "texts", json)
    if found["edited"] and not json:
        typer.echo(f"{found['edited']:.1%} of the texts were edited and accepted.")
