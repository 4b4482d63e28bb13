"""Texts by the batch: several for each item of a table, checked against rules and the item's facts, reviewed, learned.

batch.json         what was asked for
candidates.jsonl   the texts that are kept, the best first: file (a name), prompt (the item's number), rank, said, score
broken.jsonl       texts that broke a rule, each with the reason
rejects.jsonl      items that could not be used
review.html        the texts, each with two buttons; gives labels.jsonl
labelled.jsonl     the accepted texts, as a source to train on
texts.csv          every item, in the order of the source, with its texts or the reason why it has none
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from openm6.core.errors import UsageError
from openm6.core.files import sync, whole_lines, write_file
from openm6.data.columns import SlotView, require_columns
from openm6.data.source import Source, open_source
from openm6.data.store import Record
from openm6.inference import Decoding, Generated
from openm6.inference.request import Request
from openm6.inference.session import Session
from openm6.studio.copy_items import BROKEN, TABLE, goods_pictures, items_of, page_items, text_of, write_table
from openm6.studio.items import asked_of, closed_values, explain_refusal, facts_of, repeated_rows
from openm6.studio.review import (
    CANDIDATES,
    CONTENT,
    LABELLED,
    REJECTS,
    acceptance,
    as_line,
    batch_folder,
    content_of,
    go_on,
    groups,
    kept_of,
    open_rejects,
    place_of,
    progress,
    require_same,
    rows_of,
    seed_of,
    settings_of,
    usable,
    verdicts_on,
    write,
    write_review,
)
from openm6.tasks.constraints import Limits, whole_sentences
from openm6.tasks.task import Task
from openm6.tasks.values import LEXICON, OwnValues, Values

ITEMS = 16
"""Items that are written for at once."""

ALIKE = 0.8
"""Share of common runs of three characters from which two texts count as the same."""

MANY = 2_000
"""Different values up to which those of a column are a closed set: a text must not name another one's."""

_ENDS = "。！？!?.…~”』」）)"


@dataclass(frozen=True)
class _Whole:
    """A view of records that are rows of a table themselves, as those of a CSV are; a picture is no cell."""

    table: str
    picture: str | None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, record: Record, rng: Any = None) -> dict[str, Any]:
        row = {
            k: v
            for k, v in record.items()
            if not k.startswith("_") and k != self.picture and isinstance(v, (str, int, float)) and v != ""
        }
        return {**record, self.table: row}


View = SlotView | _Whole


def make_copy(
    session: Session,
    task: str | Task,
    items: str | Path,
    output: Path,
    *,
    candidates: int = 4,
    keep: int | None = None,
    columns: Mapping[str, str] | None = None,
    decoding: Mapping[str, Any] | None = None,
    forbid: Iterable[str] = (),
    least: int = 0,
    most: int = 0,
    facts: bool = True,
    lexicon: str | Path | None = None,
    resume: bool = True,
    id_column: str = "",
    table: Sequence[str] | None = None,
    data_format: str | None = None,
) -> dict[str, Any]:
    """For every item of the source write `candidates` texts, keep the `keep` best (by default 2, or all of fewer
    candidates) that break no rule and are not alike, and write `output` with a page to review them. Called again after
    a kill it goes on after the last whole item.

    `forbid`, `least`, `most`: words that never occur, characters at least and at most. `facts`: no value that other
    items have in a column of the table and this one has not, no colour or material of the lexicon that it has not, and
    no number that it has not. `lexicon` is a source of other items whose values are known too, or a YAML file that
    takes the place of openm6/tasks/lexicon.yaml. All are kept while a text is written, and checked afterwards.

    An item that is too long for the model, equal to an earlier one, or of the same id as an earlier one gets no text.

    `texts.csv` has a row for each text and one for each item without any: the item's id (`id_column`, else its number
    from 1), the columns of the source named by `table` (by default all but pictures), rank, text and reason.

    Returns {"items", "bad", "texts", "empty": items none of whose texts were kept, "broken": {reason: texts}, "page",
    "table"}. Raises UsageError for an item that has changed since its texts were written.
    """
    chosen, source = session.task(task), open_source(items, data_format)
    if [chosen.slots[name].type for name in chosen.outputs] != ["text"]:
        raise UsageError(f"The task {chosen.name} does not write one text: it gives {', '.join(chosen.outputs)}.")
    keep = kept_of(keep, candidates, 2)
    view = _view(chosen, source, columns or {})
    goods = goods_pictures(chosen, view.mapping, source)
    shown = list(table) if table is not None else [c for c in source.columns if c not in goods.mapping.values()]
    require_columns(source.columns, [*shown, *([id_column] if id_column else [])])
    options = Decoding.of(**{"temperature": 0.8, "top_p": 0.95, **chosen.decode, **(decoding or {})})
    rules: dict[str, Any] = {
        "forbid": sorted(set(forbid)),
        "least": least,
        "most": most,
        "facts": facts,
        "lexicon": str(lexicon),
    }
    Limits(session.processor.tokenizer, rules["forbid"], None, least, most)  # refuses what cannot be
    words = Path(lexicon) if lexicon and str(lexicon).endswith((".yaml", ".yml")) else LEXICON
    known = closed_values(chosen, view, source, MANY) if facts else set()
    if facts and lexicon and words is LEXICON:
        more = open_source(lexicon, data_format)
        known |= closed_values(chosen, _view(chosen, more, columns or {}), more, MANY)
    values = Values.load(words, known) if facts else None
    settings = {
        "model": str(session.path.resolve()) if session.path else "", "task": chosen.name, "items": str(items),
        CONTENT: content_of(session, source), "columns": dict(view.mapping), "candidates": candidates, "keep": keep,
        **rules,
        "words": f"{words.name} {hashlib.sha256(words.read_bytes()).hexdigest()[:12]}" if facts else "",
        **asdict(options),
    }  # fmt: skip
    slots = {name: chosen.slots[name].type for name in chosen.inputs}
    repeated = repeated_rows(source, id_column)
    ask, explain = partial(asked_of, chosen, view), partial(explain_refusal, chosen, view, id_column)
    with batch_folder(output, settings, {"kind": "texts", "slots": slots, "picture": chosen.outputs[0]}, resume):
        before = go_on(output / CANDIDATES)
        given = {number: row["given"] for number, row in before.items()}
        require_same(output, settings, source, given, lambda record: _as_json(ask(record), chosen))
        done = set(before)
        # Texts of an item that is written anew are counted once.
        write(output / BROKEN, map(as_line, [row for row in whole_lines(output / BROKEN) if row["prompt"] in done]))
        seen = {row["said"]: row["prompt"] for row in rows_of(output)}
        rejects = open_rejects(output / REJECTS, source, share=1)
        with (
            open(output / CANDIDATES, "a", encoding="utf-8") as file,
            open(output / BROKEN, "a", encoding="utf-8") as broken,
            progress() as bar,
        ):
            row = bar.add_task("items", total=len(source))
            for group in groups(len(source), ITEMS):
                for number in sorted(repeated.keys() & set(group)):
                    rejects.count(place_of(source, number, source[number]), repeated[number], source.name)
                alone = [number for number in group if number not in repeated]
                asked = dict(usable(session, chosen, ask, source, alone, rejects, explain=explain))
                if not done.issuperset(asked):
                    own = {**asdict(options), "seed": seed_of(options.seed, group.start)}
                    limits = {
                        n: _limits(session, chosen, record, values, rules, id_column) for n, record in asked.items()
                    }
                    written = _written(session, chosen, asked, limits, candidates, own)
                    for number in asked:
                        if number in done:
                            continue
                        good, bad = _judge(session, chosen, written[number], limits[number], seen, number)
                        lines = list(_lines(number, _as_json(asked[number], chosen), good[:keep]))
                        broken.writelines(as_line({"prompt": number, "said": t, "reason": r}) for t, r in bad)
                        sync(broken)
                        file.writelines(lines)
                        sync(file)
                        seen |= {text: number for text, _ in good[:keep]}
                        done.add(number)
                bar.update(row, completed=group.stop)
        found = list(items_of(output, source, id_column))
        write_file(output / TABLE, lambda draft: write_table(draft, found, id_column, shown))
        page = write_review(output, page_items(output, found, goods, id_column), id_column or "item", most)
    reasons = Counter(_kind(one["reason"]) for one in whole_lines(output / BROKEN))
    kept = Counter(row["prompt"] for row in rows_of(output) if row["rank"])
    return {
        "items": len(done), "bad": rejects.bad, "texts": kept.total(), "empty": len(done) - len(kept),
        "broken": dict(reasons.most_common()), "page": str(page),
        "table": str(output / TABLE), "lexicon": str(words) if facts else "",
    }  # fmt: skip


def write_labelled_copy(output: Path, labels: str | Path) -> dict[str, Any]:
    """Write the texts that people accepted, as they edited them, as records of the task, and tell how much they accept:
    {"file", "labelled", "accepted", "edited", "by_rank"}."""
    settings = settings_of(output, "texts")
    rows = {row["file"]: row for row in rows_of(output) if row["rank"]}
    verdicts = verdicts_on(rows, output, "text", labels)
    by_rank: dict[int, list[int]] = defaultdict(list)

    def lines() -> Iterator[str]:
        for name, row in rows.items():
            if name in verdicts:
                by_rank[row["rank"]].append(int(verdicts[name].accepted))
                if verdicts[name].accepted:
                    yield as_line({**row["given"], settings["picture"]: verdicts[name].text or row["said"]})

    file = write(output / LABELLED, lines())
    edited = sum(bool(verdict.text) for verdict in verdicts.values())
    return {"file": str(file), "edited": edited / len(verdicts), **acceptance(by_rank)}


def _view(task: Task, source: Source, columns: Mapping[str, str]) -> View:
    """Of the slots on the task's left; a table for which there is no column is made of all columns."""
    left = task.left()
    tables = [name for name in task.inputs if task.slots[name].type == "table" and name not in columns]
    if len(tables) == 1 and tables[0] not in source.columns:
        sample = next(iter(source), {})
        if not any(isinstance(value, (dict, list)) for value in sample.values()):
            return _Whole(tables[0], goods_pictures(task, columns, source).mapping.get("image"))
    return SlotView.of(left, source, columns)


def _limits(
    session: Session, task: Task, asked: Record, known: Values | None, rules: Mapping[str, Any], id_column: str
) -> Limits:
    """The rules for one item: what is forbidden to all, and, of facts, what it has not. Its id gives no number."""
    numbers = values = None
    if known is not None:
        cells, texts = facts_of(task, asked)
        values = OwnValues(known, cells, texts)
        if any(task.slots[name].type == "table" for name in task.inputs):
            numbers = [*(cell for column, cell in cells if column != id_column), *texts]
    return Limits(session.processor.tokenizer, rules["forbid"], numbers, rules["least"], rules["most"], values)


def _written(
    session: Session, task: Task, asked: Mapping[int, Record], limits: Mapping[int, Limits], candidates: int, own: Any
) -> dict[int, list[Generated]]:
    prompts = [
        session.prompt(task, Request(record, limits=None if task.sketch else limits[number]))
        for number, record in asked.items()
    ]
    made = session.generate(task, [one for one in prompts for _ in range(candidates)], decoding=own)
    return {n: made[i * candidates : (i + 1) * candidates] for i, n in enumerate(asked)}


def _judge(
    session: Session, task: Task, written: list[Generated], limits: Limits, seen: Mapping[str, int], number: int
) -> tuple[list[tuple[str, float]], list[tuple[str, str]]]:
    """The texts that can be kept, the likeliest first, each with its mean log-probability; and the others with the
    reason. One that does not come to an end is kept up to its last whole sentence, behind those that do."""
    good: list[tuple[str, float]] = []
    bad: list[tuple[str, str]] = []
    texts = []
    for one in written:
        text = str(session.read(task, one)).strip()
        is_cut = not one.finished or text[-1:] not in _ENDS
        texts.append((is_cut, -one.score / (len(one.ids) + 1), whole_sentences(text) if is_cut else text, text))
    for _, loss, said, text in sorted(texts):
        reason = limits.broken_by(said or text)
        if not text:
            reason = "says nothing"
        elif not reason and not said:
            reason = "does not come to an end"
        elif not reason and said in seen:
            reason = f"was written for item {seen[said] + 1} already"
        elif not reason and any(_alike(said, other) for other, _ in good):
            reason = "is like another of this item"
        if reason:
            bad.append((said or text, reason))
        else:
            good.append((said, -loss))
    return good, bad


def _alike(first: str, second: str) -> bool:
    one, other = ({text[i : i + 3] for i in range(max(1, len(text) - 2))} for text in (first, second))
    return len(one & other) >= ALIKE * len(one | other)


def _as_json(record: Record, task: Task) -> dict[str, Any]:
    """What an item gave, as JSON; pictures by their paths alone."""
    return {
        name: value if task.slots[name].type != "image" or isinstance(value, str) else None
        for name, value in record.items()
    }


def _lines(number: int, given: Mapping[str, Any], kept: list[tuple[str, float]]) -> Iterator[str]:
    """A line for each kept text; for an item without any one of rank 0, so that it is known to be done."""
    shown = {
        name: " ".join(map(text_of, value if isinstance(value, list) else [value]))
        if isinstance(value, (dict, list))
        else value
        for name, value in given.items()
        if value is not None
    }
    base = {"prompt": number, "of": len(kept), "asked": shown, "given": given}
    if not kept:
        yield as_line({**base, "file": f"{number:06d}-0", "rank": 0, "said": "", "score": 0.0})
    for rank, (text, score) in enumerate(kept, start=1):
        yield as_line({**base, "file": f"{number:06d}-{rank}", "rank": rank, "said": text, "score": score})


_KINDS = {
    "which is not given": "a number that is not given", "says nothing": "nothing said", "says ": "what it must not say",
    "fewer than": "too short", "more than": "too long", "was written": "written already", "is like": "alike",
}  # fmt: skip
"""Words of a reason: what it counts as."""


def _kind(reason: str) -> str:
    return next((kind for words, kind in _KINDS.items() if words in reason), reason)
