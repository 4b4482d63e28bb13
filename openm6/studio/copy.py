"""Batches of product copy: several candidates per item of a table, checked against rules and facts, then reviewed.

batch.json         settings
candidates.jsonl   the kept texts, best first: file (a name), prompt (the item's number), rank, said, score
broken.jsonl       texts that broke a rule, each with the reason
rejects.jsonl      items that could not be used
review.html        the page to review the texts; it downloads labels.jsonl
labelled.jsonl     the accepted texts, as training data
texts.csv          every item, in the order of the source, with its texts or the reason why it has none
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
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
from openm6.studio import review
from openm6.studio.items import (
    BROKEN,
    TABLE,
    asked_of,
    closed_values,
    explain_refusal,
    facts_of,
    goods_pictures,
    items_of,
    page_items,
    repeated_rows,
    text_of,
    write_table,
)
from openm6.tasks.constraints import Limits, whole_sentences
from openm6.tasks.task import Task
from openm6.tasks.values import LEXICON, OwnValues, Values

ITEMS = 16
"""Number of items per batch of decoding."""

ALIKE = 0.8
"""Jaccard similarity of character trigrams from which two texts count as near-duplicates."""

MANY = 2_000
"""Number of distinct values up to which a column is a closed set: a text must not name another item's value."""

SENTENCE_ENDS = "。！？!?.…~”』」）)"


@dataclass(frozen=True)
class _Whole:
    """A view of records that are rows of a table, as those of a CSV; the picture column is not a cell."""

    table: str
    picture: str | None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, record: Record, rng: Any = None) -> dict[str, Any]:
        cells = {k: v for k, v in record.items() if not k.startswith("_") and k != self.picture}
        return {**record, self.table: {k: v for k, v in cells.items() if isinstance(v, (str, int, float)) and v != ""}}


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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write `candidates` texts for every item of the source, keep the `keep` best (by default 2, at most `candidates`)
    that break no rule and are not near-duplicates, and write `output` with a review page. An interrupted batch is
    resumed after the last complete item.

    `forbid`, `least`, `most`: forbidden words, minimum and maximum length in characters. `facts`: a text contains no
    value of another item's table column, no colour or material of the lexicon and no number that the item lacks.
    `lexicon`: a source of more items whose values are known, or a YAML file instead of openm6/tasks/lexicon.yaml. All
    rules constrain decoding and are checked afterwards. `on_progress` gets the number of finished and of all items.

    Items that are too long for the model, or repeat an earlier item or its id, get no text.

    `texts.csv` has a row per text and one per item without any: the item's id (`id_column`, else its number from 1),
    the columns of the source named by `table` (by default all but pictures), rank, text and reason.

    Returns {"items", "bad", "texts", "empty": items without a kept text, "broken": {reason: texts}, "page", "table"}.
    Raises UsageError for an item that has changed since its texts were written.
    """
    chosen, source = session.task(task), open_source(items, data_format)
    if [chosen.slots[name].type for name in chosen.outputs] != ["text"]:
        raise UsageError(f"The task {chosen.name} does not write one text: it gives {', '.join(chosen.outputs)}.")
    keep = review.kept_of(keep, candidates, 2)
    view = _view(chosen, source, columns or {})
    goods = goods_pictures(chosen, view.mapping, source)
    shown = list(table) if table is not None else [c for c in source.columns if c not in goods.mapping.values()]
    require_columns(source.columns, [*shown, *([id_column] if id_column else [])])
    options = Decoding.of(**{"temperature": 0.8, "top_p": 0.95, **chosen.decode, **(decoding or {})})
    rules: dict[str, Any] = {"forbid": sorted(set(forbid)), "least": least, "most": most}
    Limits(session.processor.tokenizer, rules["forbid"], None, least, most)  # raises for contradictory rules
    words = Path(lexicon) if lexicon and str(lexicon).endswith((".yaml", ".yml")) else LEXICON
    known = closed_values(chosen, view, source, MANY) if facts else set()
    if facts and lexicon and words is LEXICON:
        more = open_source(lexicon, data_format)
        known |= closed_values(chosen, _view(chosen, more, columns or {}), more, MANY)
    values = Values.load(words, known) if facts else None
    settings = {
        "model": str(session.path.resolve()) if session.path else "", "task": chosen.name, "items": str(items),
        review.CONTENT: review.content_of(session, source), "columns": dict(view.mapping),
        "candidates": candidates, "keep": keep, **rules, "facts": facts, "lexicon": str(lexicon),
        "words": f"{words.name} {hashlib.sha256(words.read_bytes()).hexdigest()[:12]}" if facts else "",
        **asdict(options),
    }  # fmt: skip
    slots = {name: chosen.slots[name].type for name in chosen.inputs}
    repeated = repeated_rows(source, id_column)
    ask, explain = partial(asked_of, chosen, view), partial(explain_refusal, chosen, view, id_column)
    with review.batch_folder(output, settings, {"kind": "texts", "slots": slots, "picture": chosen.outputs[0]}, resume):
        before = review.go_on(output / review.CANDIDATES)
        given = {number: row["given"] for number, row in before.items()}
        review.require_same(output, settings, source, given, lambda record: _as_json(ask(record), chosen))
        done = set(before)
        # The rejected texts of an incomplete item are written again.
        kept_broken = [row for row in whole_lines(output / BROKEN) if row["prompt"] in done]
        review.write(output / BROKEN, map(review.as_line, kept_broken))
        seen = {row["said"]: row["prompt"] for row in review.rows_of(output)}
        rejects = review.open_rejects(output / review.REJECTS, source, max_fraction=1)
        with (
            open(output / review.CANDIDATES, "a", encoding="utf-8") as file,
            open(output / BROKEN, "a", encoding="utf-8") as broken,
        ):
            for group in review.groups(len(source), ITEMS):
                for number in sorted(repeated.keys() & set(group)):
                    rejects.count(review.place_of(source, number, source[number]), repeated[number], source.name)
                alone = [number for number in group if number not in repeated]
                asked = dict(
                    review.usable(
                        session, chosen, ask, source, alone, rejects, decoding=asdict(options), explain=explain
                    )
                )
                if not done.issuperset(asked):
                    own = {**asdict(options), "seed": review.seed_of(options.seed, group.start)}
                    limits = {n: _limits(session, chosen, row, values, rules, id_column) for n, row in asked.items()}
                    requests = [Request(row, limits=None if chosen.sketch else limits[n]) for n, row in asked.items()]
                    prompts = [session.prompt(chosen, request) for request in requests]
                    repeated_prompts = [prompt for prompt in prompts for _ in range(candidates)]
                    written = iter(session.generate(chosen, repeated_prompts, decoding=own))
                    for number in asked:
                        texts = list(islice(written, candidates))
                        if number in done:
                            continue
                        good, bad = judge_texts(session, chosen, texts, limits[number], seen)
                        lines = list(_lines(number, _as_json(asked[number], chosen), good[:keep]))
                        broken.writelines(review.as_line({"prompt": number, "said": t, "reason": r}) for t, r in bad)
                        sync(broken)
                        file.writelines(lines)
                        sync(file)
                        seen |= {text: number for text, _ in good[:keep]}
                        done.add(number)
                on_progress(group.stop, len(source))
        found = list(items_of(output, source, id_column))
        write_file(output / TABLE, lambda draft: write_table(draft, found, id_column, shown))
        page = review.write_review(output, page_items(output, found, goods, id_column), id_column or "item", most)
    reasons = Counter(kind_of_reason(one["reason"]) for one in whole_lines(output / BROKEN))
    kept = Counter(row["prompt"] for row in review.rows_of(output) if row["rank"])
    return {
        "items": len(done), "bad": rejects.bad, "texts": kept.total(), "empty": len(done) - len(kept),
        "broken": dict(reasons.most_common()), "page": str(page),
        "table": str(output / TABLE), "lexicon": str(words) if facts else "",
    }  # fmt: skip


def write_labelled_copy(output: Path, labels: str | Path) -> dict[str, Any]:
    """Write the accepted texts, as edited, as records of the task. Returns: see `review.write_labels`, and {"edited":
    fraction}."""
    settings = review.settings_of(output, "texts")
    rows = {row["file"]: row for row in review.rows_of(output) if row["rank"]}
    verdicts = review.verdicts_on(rows, output, "text", labels)

    def labelled() -> Iterator[tuple[int, bool, Record | None]]:
        for name, row in rows.items():
            if verdict := verdicts.get(name):
                record = {**row["given"], settings["picture"]: verdict.text or row["said"]}
                yield row["rank"], verdict.accepted, record if verdict.accepted else None

    found = review.write_labels(output, labelled())
    return {**found, "edited": sum(bool(verdict.text) for verdict in verdicts.values()) / len(verdicts)}


def _view(task: Task, source: Source, columns: Mapping[str, str]) -> View:
    """A view for the task's input slots; a table slot without a column is filled from all columns."""
    left = task.without_target()
    tables = [name for name in task.inputs if task.slots[name].type == "table" and name not in columns]
    if len(tables) == 1 and tables[0] not in source.columns:
        sample = next(iter(source), {})
        if not any(isinstance(value, (dict, list)) for value in sample.values()):
            return _Whole(tables[0], goods_pictures(task, columns, source).mapping.get("image"))
    return SlotView.of(left, source, columns)


def _limits(
    session: Session, task: Task, asked: Record, known: Values | None, rules: Mapping[str, Any], id_column: str
) -> Limits:
    """The rules for one item: the general ones, and the values and numbers that it lacks. Its id allows no number."""
    numbers = values = None
    if known is not None:
        cells, texts = facts_of(task, asked)
        values = OwnValues(known, cells, texts)
        if any(task.slots[name].type == "table" for name in task.inputs):
            numbers = [*(cell for column, cell in cells if column != id_column), *texts]
    return Limits(session.processor.tokenizer, rules["forbid"], numbers, rules["least"], rules["most"], values)


def judge_texts(
    session: Session, task: Task, written: list[Generated], limits: Limits, seen: Mapping[str, int]
) -> tuple[list[tuple[str, float]], list[tuple[str, str]]]:
    """The texts to keep, the most likely first, each with its mean log-probability; and the others with their reasons.
    An unfinished text is kept up to its last complete sentence, after the finished ones."""
    good: list[tuple[str, float]] = []
    bad: list[tuple[str, str]] = []
    texts = []
    for one in written:
        text = str(session.read(task, one)).strip()
        is_cut = not one.finished or text[-1:] not in SENTENCE_ENDS
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
    """The inputs of an item as JSON; pictures only if they are paths."""
    pictures = {name for name, slot in task.slots.items() if slot.type == "image"}
    return {k: None if k in pictures and not isinstance(v, str) else v for k, v in record.items()}


def _lines(number: int, given: Mapping[str, Any], kept: list[tuple[str, float]]) -> Iterator[str]:
    """A line per kept text; for an item without any, one of rank 0, which marks it as done."""
    shown = {name: value for name, value in given.items() if value is not None}
    for name, value in shown.items():
        if isinstance(value, (dict, list)):
            shown[name] = " ".join(map(text_of, value if isinstance(value, list) else [value]))
    base = {"prompt": number, "of": len(kept), "asked": shown, "given": given}
    if not kept:
        yield review.as_line({**base, "file": f"{number:06d}-0", "rank": 0, "said": "", "score": 0.0})
    for rank, (text, score) in enumerate(kept, start=1):
        yield review.as_line({**base, "file": f"{number:06d}-{rank}", "rank": rank, "said": text, "score": score})


_KINDS = {
    "which is not given": "a number that is not given", "says nothing": "nothing said", "says ": "what it must not say",
    "fewer than": "too short", "more than": "too long", "was written": "written already", "is like": "alike",
}  # fmt: skip
"""Words of a reason, and its kind in the statistics."""


def kind_of_reason(reason: str) -> str:
    return next((kind for words, kind in _KINDS.items() if words in reason), reason)
