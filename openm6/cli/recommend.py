"""openm6 recommend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli import app
from openm6.cli.output import Encoding, Format, Json, Names, NoCache, emit, pairs, table

recommend = typer.Typer(help="What a customer may want next, from an index and past visits.", no_args_is_help=True)
app.add_typer(recommend, name="recommend")

Place = Annotated[Path, typer.Argument(help="Folder of the recommender.")]
Visits = Annotated[str, typer.Option(help="Visits: a path or built-in data with the columns history and bought.")]


@recommend.command()
def fit(
    path: Place,
    index: Annotated[Path, typer.Option(help="The index of the items.")],
    visits: Visits,
    context: Annotated[list[str] | None, typer.Option(help="A column of the visit that is known.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    data_format: Format = None,
    encoding: Encoding = None,
    names: Names = None,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Learn from visits what to put first: `openm6 recommend fit runs/next --index goods --visits visits.jsonl`"""
    from openm6.atomic import require_new
    from openm6.data.readers import with_options
    from openm6.data.source import open_source
    from openm6.retrieve.index import Index
    from openm6.retrieve.recommend import Recommender

    require_new(path)
    records = open_source(visits, with_options(data_format, encoding, names))
    made = Recommender.fit(Index.open(index), records, context or [], seed)
    made.save(path)
    if json:
        emit({"recommender": str(path), "visits": len(records), "items": len(made.index)})
    else:
        typer.echo(f"{path}: learned from {len(records)} visits to {len(made.index)} items.")


@recommend.command("eval")
def evaluate(
    path: Place,
    visits: Visits,
    data_format: Format = None,
    encoding: Encoding = None,
    names: Names = None,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Measure on visits that were not learned from, beside what is near alone and what is most bought."""
    from openm6.data.readers import with_options
    from openm6.data.source import open_source
    from openm6.retrieve.recommend import Recommender

    source = open_source(visits, with_options(data_format, encoding, names))
    found = Recommender.load(path).measure(source)
    if json:
        emit({way: {n: [s.value, s.low, s.high, s.n] for n, s in scores.items()} for way, scores in found.items()})
        return
    table(["way", "metric", "value", "95% interval", "visits"], [
        (way, name, f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}", s.n)
        for way, scores in found.items() for name, s in scores.items()
    ], f"{path} on {visits}")  # fmt: skip


@recommend.command("for")
def for_one(
    path: Place,
    context: Annotated[list[str] | None, typer.Argument(help="What is known of the visit: column=value.")] = None,
    history: Annotated[str, typer.Option(help="Ids that were bought, the oldest first, with commas between.")] = "",
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    json: Json = False,
) -> None:
    """Recommend: `openm6 recommend for runs/next season=冬季 --history A17,B3`; without a history what sells."""
    from openm6.retrieve.recommend import Recommender

    ids = [name.strip() for name in history.split(",") if name.strip()]
    found = Recommender.load(path).recommend(ids, pairs(context or []), k)
    if json:
        emit([{"id": one.id, "score": round(one.score, 6)} for one in found])
    else:
        table(["id", "score"], [(one.id, f"{one.score:.3f}") for one in found])
