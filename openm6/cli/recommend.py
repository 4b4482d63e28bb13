"""openm6 recommend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli import options
from openm6.cli.app import app
from openm6.cli.output import emit, pairs, say_rejects, table, write_rejects

recommend = typer.Typer(help="Recommender: recall from an index, ranking learned from visits.", no_args_is_help=True)
app.add_typer(recommend, name="recommend")

Place = Annotated[Path, typer.Argument(help="Folder of the recommender.")]
Visits = Annotated[str, typer.Option(help="Visits: path or built-in data with the columns history and bought.")]

FEW = 300
"""Number of visits below which `fit` warns. On the generated goods of tests/retrieve/test_recommend.py recall@10 is 0%
after training on 3 visits (34% by similarity alone), 55% to 71% after 10, 73% to 76% after 300."""


@recommend.command()
def fit(
    path: Place,
    index: Annotated[Path, typer.Option(help="Directory of the item index.")],
    visits: Visits,
    context: Annotated[
        list[str] | None, typer.Option(help="Column of the visit used as context, e.g. season; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    data_format: options.Format = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    no_cache: options.NoCache = False,
    json: options.Json = False,
) -> None:
    """Train the ranker on visits: `openm6 recommend fit runs/next --index goods --visits visits.jsonl`"""
    from openm6.core.files import require_new
    from openm6.data.readers import with_options
    from openm6.data.rejects import Reject
    from openm6.data.source import open_source
    from openm6.retrieve.index import Index
    from openm6.retrieve.recommend import Recommender

    require_new(path)
    records = open_source(visits, with_options(data_format, encoding, names))
    rejected: list[Reject] = []
    made = Recommender.fit(Index.open(index), records, context or [], seed, rejected.append)
    made.save(path)
    rejects = write_rejects(path / "rejects.jsonl", rejected, made.learned.visits)
    notes = []
    if made.learned.without_history:
        notes.append(
            f"{made.learned.without_history} of these visits have no item of the index in their history: they only "
            "teach popularity."
        )
    if made.learned.visits < FEW:
        notes.append(
            f"Fewer than {FEW} visits: the ranking may follow single customers; measure it by `openm6 recommend eval` "
            "on other visits."
        )
    if json:
        counts = {"visits": made.learned.visits, "without_history": made.learned.without_history}
        reasons = [reject.reason for reject in rejected]
        emit({"recommender": str(path), **counts, "rejected": reasons, "items": len(made.index), "notes": notes})
        return
    given = made.learned.visits + len(rejected)
    typer.echo(f"{path}: trained on {made.learned.visits} of {given} visits to {len(made.index)} items.")
    say_rejects(rejects)
    for note in notes:
        typer.echo(note)


@recommend.command("eval")
def evaluate(
    path: Place,
    visits: Visits,
    data_format: options.Format = None,
    encoding: options.Encoding = None,
    names: options.Names = None,
    no_cache: options.NoCache = False,
    json: options.Json = False,
) -> None:
    """Evaluate on held-out visits, beside ranking by similarity and by popularity."""
    from openm6.data.readers import with_options
    from openm6.data.rejects import Reject
    from openm6.data.source import open_source
    from openm6.retrieve.recommend import Recommender

    source = open_source(visits, with_options(data_format, encoding, names))
    rejected: list[Reject] = []
    found = Recommender.load(path).measure(source, rejected.append)
    if json:
        values = {
            part: {way: {n: [s.value, s.low, s.high, s.n] for n, s in scores.items()} for way, scores in ways.items()}
            for part, ways in found.items()
        }
        emit({"slices": values, "rejected": [reject.reason for reject in rejected]})
        return
    for part, ways in found.items():
        table(["way", "metric", "value", "95% interval", "visits"], [
            (way, name, f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}", s.n)
            for way, scores in ways.items() for name, s in scores.items()
        ], f"{path} on {visits}: {part}")  # fmt: skip
    if rejected:
        typer.echo(f"Visits that could not be used: {len(rejected)}, the first: {rejected[0].reason}")


@recommend.command("for")
def for_one(
    path: Place,
    context: Annotated[list[str] | None, typer.Argument(help="Context of the visit, column=value.")] = None,
    history: Annotated[str, typer.Option(help="Comma-separated ids of past purchases, oldest first.")] = "",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    json: options.Json = False,
) -> None:
    """Recommend items for a visit: `openm6 recommend for runs/next season=冬季 --history A17,B3`. Without a history:
    best sellers."""
    from openm6.retrieve.recommend import Recommender

    ids = [name.strip() for name in history.split(",") if name.strip()]
    found = Recommender.load(path).recommend(ids, pairs(context or []), k)
    if json:
        items = [{"id": one.id, "score": round(one.score, 6), **one.columns} for one in found.items]
        emit({"from_history": found.from_history, "unknown": found.unknown, "items": items})
        return
    if found.unknown:
        typer.echo(f"The index does not have {', '.join(found.unknown)}.")
    if not found.from_history:
        typer.echo("No known item in the history: these are best sellers, ranked by the context.")
    columns = list(found.items[0].columns) if found.items else []
    rows = [[one.id, f"{one.score:.3f}", *one.columns.values()] for one in found.items]
    table(["id", "score", *columns], rows)
