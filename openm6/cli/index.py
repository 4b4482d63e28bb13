"""openm6 index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.checks import MODEL, check_inputs, find
from openm6.cli.output import counted, emit, pairs, say_rejects, table, write_rejects
from openm6.core.errors import UsageError

if TYPE_CHECKING:
    from openm6.inference.session import Session
    from openm6.retrieve import Index

index = typer.Typer(help="Vector index: build, update, search (two-tower retrieval).", no_args_is_help=True)
app.add_typer(index, name="index")

Place = Annotated[Path, typer.Argument(help="Directory of the index.")]
Data = Annotated[str, typer.Option(help="Items: path, URL or glob, or built-in data.")]


@index.command()
def build(
    path: Place,
    model: Annotated[str, typer.Option(help=MODEL)],
    task: Annotated[str, typer.Option(help="Task that embeds an item.")],
    data: Data,
    query_task: Annotated[str | None, typer.Option(help="Task that embeds a query. Default: --task.")] = None,
    id_column: Annotated[str, typer.Option("--id", help="Column with the id. Default: place in the data.")] = "",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Column to store, filter by and show, with or without a type: price:float; repeatable."),
    ] = None,
    column: options.Column = None,
    dims: Annotated[int | None, typer.Option(min=1, help="Truncate vectors to this number of dimensions.")] = None,
    data_format: options.Format = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    images: options.Images = None,
    no_cache: options.NoCache = False,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Build an index of the items of a source. An interrupted build is resumed by the same command."""
    place = check_inputs(model, [task, query_task], [data])
    columns = pairs(column or [])

    from openm6.data.readers import with_options
    from openm6.inference.session import Session
    from openm6.retrieve.fill import create_for, types_given
    from openm6.retrieve.index import Index

    session, data_format = Session.load(place), with_options(data_format, encoding, names)
    if (path / "index.json").is_file():
        made = Index.open(path)
        _require_same(
            made, model=str(place.resolve()), task=task, query_task=query_task or task, id_column=id_column,
            slots=columns, dims=dims, columns=types_given(keep or []),
        )  # fmt: skip
    else:
        made = create_for(
            path, session, task, data, query_task=query_task, id_column=id_column, keep=keep or [],
            columns=columns, dims=dims, data_format=data_format, images=images,
        )  # fmt: skip
    _fill(made, session, data, data_format, images, True, truncate, json)


@index.command()
def add(
    path: Place,
    data: Data,
    only_new: Annotated[bool, typer.Option("--only-new", help="Skip items whose ids are in the index.")] = False,
    data_format: options.Format = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    images: options.Images = None,
    no_cache: options.NoCache = False,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Add items; items with the same id are replaced."""
    from openm6.data.readers import with_options
    from openm6.data.source import check_source

    check_source(data)
    made, session = _open(path)
    _fill(made, session, data, with_options(data_format, encoding, names), images, only_new, truncate, json)


@index.command()
def delete(
    path: Place,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of items.")] = None,
    where: Annotated[str, typer.Option(help='SQL filter instead of ids, e.g. "price > 100".')] = "",
    json: options.Json = False,
) -> None:
    """Delete items by id or by a filter."""
    from openm6.retrieve.index import Index

    made = Index.open(path)
    gone = made.delete(ids or [], where)
    if json:
        counts = {"deleted": len(gone.deleted), "unknown": len(gone.unknown), "unknown_ids": gone.unknown}
        emit({**counts, "items": len(made), "version": made.version})
        return
    typer.echo(f"{_counted(gone.deleted, 'deleted')}; {path} has {len(made)} items.")
    if gone.unknown:
        typer.echo(f"{_counted(gone.unknown, 'unknown')}: the index has no such id.")


@index.command()
def search(
    path: Place,
    slots: Annotated[list[str], typer.Argument(help="Inputs of the query task, slot=value.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    where: Annotated[str, typer.Option(help="SQL filter, e.g. \"price < 100 AND colour = '红色'\".")] = "",
    task: Annotated[str | None, typer.Option(help="Task that embeds the query. Default: the index's.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Search all items instead of inverted lists.")] = False,
    truncate: options.Truncate = None,
    json: options.Json = False,
) -> None:
    """Find the items nearest to a query: `openm6 index search goods text=红色条纹的裙子 --where "price < 100"`"""
    asked: dict[str, Any] = dict(pairs(slots))
    made, session = _open(path)
    vector = session.run(task or made.about["query_task"], decoding={"dims": made.dims}, truncate=truncate, **asked)
    columns = list(made.about["columns"])
    hits = made.search(vector, k, where=where, columns=columns, exact=exact)[0]
    if json:
        emit([{"id": hit.id, "score": round(hit.score, 6), **hit.columns} for hit in hits])
        return
    rows = [[hit.id, f"{hit.score:.3f}", *(hit.columns[name] for name in columns)] for hit in hits]
    table(["id", "cosine", *columns], rows)


@index.command()
def tune(
    path: Place,
    recall: Annotated[float, typer.Option(min=0.1, max=1, help="Target recall@10.")] = 0.95,
    lists: Annotated[
        int | None, typer.Option(min=1, help="Number of inverted lists. Default: 4 x square root of the items.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Speed up searches without a filter in a large index: build inverted lists (IVF) and tune the probes."""
    from openm6.retrieve.index import Index

    found = Index.open(path).tune(recall, lists)
    if json:
        emit(found)
    else:
        typer.echo(f"Probing {found['probes']} of {found['lists']} lists: recall@10 {found['recall@10']:.3f}.")


@index.command()
def show(path: Place, json: options.Json = False) -> None:
    """Show the contents and settings of an index."""
    from openm6.retrieve.index import Index

    made = Index.open(path)
    details: dict[str, Any] = {"items": len(made), "version": made.version, **made.about, "versions": made.versions()}
    if json:
        emit(details)
    else:
        table(["", ""], [[name, value] for name, value in details.items() if name != "versions"], str(path))


def _open(path: Path) -> tuple[Index, Session]:
    from openm6.retrieve.index import Index

    made = Index.open(path)
    if "model" not in made.about:
        raise UsageError(f"{path} does not name the model of its vectors: use openm6.retrieve.Index.")
    place = find(made.about["model"])

    from openm6.inference.session import Session

    return made, Session.load(place)


def _require_same(made: Index, columns: dict[str, str], dims: int | None, **asked: Any) -> None:
    """Refuse to resume an index that was started with other settings."""
    from openm6.retrieve.columns import describe

    before = made.about
    same_columns = columns.keys() == before["columns"].keys() and all(
        kind in ("", before["columns"][name]) for name, kind in columns.items()
    )
    found = {name: value for name, value in before.items() if name in asked and value != asked[name]}
    if not same_columns:
        found["columns"] = describe(before["columns"])
    if dims not in (None, made.dims):
        found["dims"] = made.dims
    if found:
        details = "; ".join(f"{name}: {value or 'none'}" for name, value in found.items())
        raise UsageError(f"{made.path} was started with other settings ({details}): use them, or another directory.")


def _counted(ids: list[str], what: str) -> str:
    """`3 replaced (A17, A18, B2)`; at most three ids are named."""
    named = f" ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" if ids else ""
    return f"{len(ids)} {what}{named}"


def _fill(
    made: Index, session: Session, data: str, data_format: str | None, images: str | None, only_new: bool,
    truncate: str | None, json: bool,
) -> None:  # fmt: skip
    from openm6.data.rejects import Reject
    from openm6.retrieve.columns import describe
    from openm6.retrieve.fill import add_source

    rejected: list[Reject] = []
    with counted("items") as on_progress:
        filled = add_source(
            made, session, data, data_format=data_format, images=images, only_new=only_new,
            on_progress=on_progress, on_reject=rejected.append, truncate=truncate,
        )  # fmt: skip
    used = len(filled.new) + len(filled.replaced) + len(filled.passed_over)
    rejects = write_rejects(made.path / "rejects.jsonl", rejected, used)
    if json:
        names = ("new", "replaced", "passed_over", "repeated")
        counts: dict[str, Any] = {name: len(getattr(filled, name)) for name in names}
        counts |= {"replaced_ids": filled.replaced, "repeated_ids": filled.repeated}
        reasons = [reject.reason for reject in rejected]
        emit({**counts, "rejected": reasons, "items": len(made), "version": made.version})
    else:
        parts = [_counted(filled.new, "new"), _counted(filled.replaced, "replaced")]
        typer.echo(f"{', '.join(parts)}; {made.path} has {len(made)} items ({describe(made.about['columns'])}).")
        if filled.passed_over:
            details = _counted(filled.passed_over, "already in the index and skipped")
            typer.echo(f"{details}: `openm6 index add` without --only-new replaces them.")
        if filled.repeated:
            typer.echo(f"{_counted(filled.repeated, 'repeated')}: of several records with one id the first counts.")
        say_rejects(rejects)
    if rejected and not used:
        raise typer.Exit(1)
