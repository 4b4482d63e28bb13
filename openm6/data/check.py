"""Check of data for a task: every record is opened as in training."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openm6.core.errors import DataError, cut
from openm6.core.images import ImageGrid, open_image
from openm6.core.sequence import IGNORE
from openm6.core.tokenizer import HALF, Tokenizer
from openm6.data.columns import Classes, SlotView
from openm6.data.overlap import Twins, find_overlap
from openm6.data.source import open_source
from openm6.data.store import Record
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.grammar import Slot
from openm6.tasks.processor import Processor
from openm6.tasks.record import is_given, labels_of
from openm6.tasks.slots import TYPES

if TYPE_CHECKING:
    from openm6.tasks.task import Task

EXAMPLES = 3
"""Number of records shown as training examples."""


class Check:
    """`for record in check.records(): check.look(record)`, then `to_dict()`. `command` is the command with which a user
    checks these data.

    Raises UsageError where a slot has no column, DataError for data that cannot be opened at all."""

    def __init__(
        self,
        source: str,
        task: Task,
        columns: Mapping[str, str],
        data_format: str | None = None,
        images: str | None = None,
        limit: int | None = None,
        command: str | None = None,
        processor: Processor | None = None,
        against: str | None = None,
    ):
        self.task = task
        self._source = open_source(source, data_format, images, limit=limit)
        self._view = SlotView.of(task, self._source, columns, command)
        self.total = len(self._source)
        self._processor, self._tokens, self._cut = processor, defaultdict[str, list[int]](list), list[int]()
        self._twins, self._number, self._overlap = Twins(task, self._view), 0, None
        if against is not None:
            other = open_source(against, data_format, images)
            self._overlap = find_overlap(task, self._source, columns, other, columns)
        self._good = 0
        self._lengths: dict[str, list[int]] = {}
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._classes = {name: Classes() for name, slot in task.slots.items() if slot.type == "label"}
        self._examples: list[dict[str, str]] = []
        for reject in self._source.rejected:
            self._problem(reject.where, reject.reason)

    def records(self) -> Iterator[Record]:
        return iter(self._source)

    def look(self, record: Record) -> None:
        number, self._number = self._number, self._number + 1
        try:
            seen = self._view(record)
            for name, slot in self.task.slots.items():
                value = seen.get(name)
                if slot.type == "vector" or (slot.is_optional and not is_given(seen, slot)):
                    continue
                if value is None or value == "":
                    problem = "the conversation ends with a question" if self.task.converses else f"{name} is missing"
                    raise DataError(f"{problem}.")
                if slot.type == "messages":
                    continue
                if slot.type == "image":
                    open_image(value)
                elif slot.type in ("text", "label"):
                    self._text(name, value, labels_of(self.task, seen, name))
                else:
                    _read(name, slot.type, value)
            if self._processor:
                self._measure(seen, self._processor)
            if len(self._examples) < EXAMPLES:
                given, wanted = preview(self.task, seen, self._processor or plain_processor())
                self._examples.append({"where": str(record.get("_where", "?")), "source": given, "target": wanted})
        except DataError as error:
            self._problem(str(record.get("_where", "?")), str(error))
        else:
            self._good += 1
            self._twins.add(number, record)
            for name, classes in self._classes.items():
                classes.add(record.get(self._view.mapping.get(name, "")))

    def _text(self, name: str, value: Any, known: tuple[str, ...]) -> None:
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"{name} has to be a text, not {type(text).__name__}.")
            if known and text not in known:
                raise DataError(f"{name} is {cut(text)!r}, none of the task's labels: {', '.join(known[:10])}.")
            self._lengths.setdefault(name, []).append(len(text))

    def _measure(self, seen: Record, processor: Processor) -> None:
        """Count the tokens of a record's slots, of its whole example, and of the part that is cut off."""
        can_encode_target = not self.task.draws or processor.codec is not None
        encode = encode_example if can_encode_target else encode_prompt
        sequence = encode(self.task, seen, processor, truncate="end")
        for name, slot in self.task.slots.items():
            if slot.type in ("text", "label", "table") and seen.get(name) is not None and is_given(seen, slot):
                value = seen[name][0] if slot.type != "table" and isinstance(seen[name], list) else seen[name]
                self._tokens[name].append(len(TYPES[slot.type].target(value, processor)))
        if sequence.pictures:
            self._tokens["(pictures)"].append(sum(picture.patches for picture in sequence.pictures))
        self._tokens["(example)"].append(len(sequence) + sequence.truncated)
        if sequence.truncated:
            self._cut.append(sequence.truncated)

    def _problem(self, where: str, reason: str) -> None:
        # The same fault has the same text at every place.
        reason = reason.replace(where, "").removeprefix(where.rsplit(":", 1)[0]).strip(" :")
        self._counts[reason] += 1
        self._first.setdefault(reason, where)

    def _fitting(self, longest: int) -> dict[str, Any]:
        """Number of records that fit into the `longest` example of a model, and of those that do not."""
        tokens = {name: _spread(lengths) for name, lengths in self._tokens.items()}
        cut = {"records": len(self._cut), **(_spread(self._cut) if self._cut else {"median": 0, "longest": 0})}
        return {"tokens": tokens, "max_length": longest, "cut": cut}

    def _agreeing(self) -> dict[str, Any]:
        """Duplicate and conflicting records, and overlap with the other source."""
        found: dict[str, Any] = self._twins.count()
        for twins in found.values():
            twins["first"] = [str(self._source[number].get("_where", number)) for number in twins["first"]]
        if self._overlap is not None:
            found["overlap"] = {**self._overlap._asdict(), "found": len(self._overlap.found)}
        return found

    def sentences(self) -> list[str]:
        """Sentences about the labels, duplicate records, and examples that do not fit."""
        said = [text for name, classes in self._classes.items() for text in classes.sentences(name)]
        found = self._agreeing()
        for name, what in (("duplicates", "Records that repeat another"), ("conflicts", "Inputs with several answers")):
            if found[name]["count"]:
                said.append(f"{what}: {found[name]['count']:,}, such as {' and '.join(found[name]['first'])}.")
        if self._overlap is not None:
            shared, total, where = self._overlap
            first = f" (first: {where})" if shared else ""
            said.append(f"{len(shared):,} of {total:,} records that are measured on have inputs of these data{first}.")
        if self._processor and self._cut:
            most = _spread(self._cut)
            said.append(
                f"{len(self._cut):,} of {self._good:,} records are longer than {self._processor.max_length:,} tokens"
                f" (the model's max_length) and lose their ends in training: {most['median']:,} tokens (median), "
                f"{most['longest']:,} at most."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "records": self.total + len(self._source.rejected),
            "good": self._good,
            "columns": {n: self._view.mapping.get(n) for n, s in self.task.slots.items() if s.type != "vector"},
            "examples": self._examples,
            "characters": {name: _spread(lengths) for name, lengths in self._lengths.items()},
            **(self._fitting(self._processor.max_length) if self._processor else {}),
            "classes": {name: classes.to_dict() for name, classes in self._classes.items()},
            **self._agreeing(),
            "problems": [
                {"reason": reason, "count": count, "where": self._first[reason]}
                for reason, count in self._counts.most_common(20)
            ],
        }


def _read(name: str, kind: str, value: Any) -> None:
    """Check a value of a slot. Raises DataError, with the slot's name, for a value of another type."""
    try:
        TYPES[kind].target(value, plain_processor())
    except DataError as error:
        raise DataError(f"{name} {error}") from None


def _spread(lengths: list[int]) -> dict[str, int]:
    return {"median": int(statistics.median(lengths)), "longest": max(lengths)}


_SHOWN = 160
"""Maximum characters of a side; the middle of a longer one is left out."""


@lru_cache(maxsize=1)
def plain_processor() -> Processor:
    """A processor without a model: it lays examples out whole, in bytes."""
    return Processor(Tokenizer.train((), 300, num_codes=0), ImageGrid(16, 16), 2**31)


def preview(task: Task, record: Mapping[str, Any], processor: Processor) -> tuple[str, str]:
    """Source and target of a record, by the task's first instruction, with its corruptions: texts as truncated to the
    processor's `max_length`, pictures by name and size in pixels. Raises DataError as `encode_example` does."""
    tokenizer = processor.tokenizer
    plain = not (task.draws or task.produces_no_tokens or task.sketch)
    sequence = (encode_example if plain else encode_prompt)(task, record, processor, truncate="end")
    given = [p.name for p in task.instructions[0].source if isinstance(p, Slot) and p.type == "image"]
    pictures = [_picture(record[name]) for name in given if record.get(name) is not None]
    source = _text_of(sequence.ids[sequence.labels == IGNORE].tolist(), pictures, tokenizer)
    if plain:
        target = _text_of(sequence.labels[sequence.labels != IGNORE].tolist(), [], tokenizer)
    else:
        value = record.get(task.outputs[0])
        value = value[0] if task.sketch and isinstance(value, list) else value
        target = "(a vector)" if task.embeds else _picture(value) if task.draws else str(value)
    if sequence.truncated:  # perhaps within a character
        source, target = source.replace(HALF, ""), target.replace(HALF, "")
    return _short(source), _short(target)


def _text_of(ids: list[int], pictures: Iterable[str], tokenizer: Tokenizer) -> str:
    """The text of ids, with pictures by name, gaps as `____`, and the marks of tables."""
    marks = {
        tokenizer.mask_id: "____", tokenizer.table_id: "<|table|>", tokenizer.table_end_id: "<|/table|>",
        tokenizer.row_id: "<|row|>", tokenizer.cell_id: "<|cell|>",
    }  # fmt: skip
    names, text = iter(pictures), ""
    run: list[int] = []
    for token in [*ids, tokenizer.end_id]:
        if token in marks or token in (tokenizer.image_id, tokenizer.end_id):
            text += tokenizer.decode(run)
            text += marks.get(token, "") or (next(names, "") if token == tokenizer.image_id else "")
            run = []
        elif token not in (tokenizer.patch_id, tokenizer.image_end_id):
            run.append(token)
    return text


def _picture(value: Any) -> str:
    name = Path(value).name if isinstance(value, (str, Path)) else "picture"
    size = "{} x {}".format(*open_image(value).size) if isinstance(value, (str, Path, bytes)) else "features or codes"
    return f"[{name}, {size}]"


def _short(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
