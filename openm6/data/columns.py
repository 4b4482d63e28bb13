"""Mapping of data columns to the slots of a task, records by slot, and the classes of labels."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.images import PICTURES
from openm6.data.conversations import conversation_key, conversation_of, split_answer
from openm6.data.files import is_remote, join, read_file
from openm6.data.store import Record, Records
from openm6.tasks.slots.label import normalize_label

if TYPE_CHECKING:
    from openm6.data.source import Source
    from openm6.tasks.task import Task

_SYNONYMS = (
    ("image", "img", "picture", "photo", "image_path", "img_path", "image_file", "image_bytes", "file_name", "filename",
     "图片", "图像", "照片", "图片路径"),
    ("question", "query", "问题", "提问"),
    ("answer", "answers", "response", "答案", "回答"),
    ("caption", "captions", "description", "描述", "图片描述"),
    ("text", "texts", "body", "content", "sentence", "正文", "文本", "内容", "评论"),
    ("label", "labels", "class", "category", "cls", "类别", "标签", "分类", "情感"),
    ("title", "titles", "标题"),
    ("summary", "摘要"),
    ("passage", "文章", "正文"),
    ("table", "attributes", "属性"),
)  # fmt: skip
"""Column names of one meaning, the most usual first; a task's own `aliases` take precedence. A slot of another name
takes those of its type."""

_POSSIBLE = {
    "caption": ("text", "texts", "文本", "内容", "title", "标题", "name", "名称"),
    "text": ("caption", "captions", "description", "描述", "title", "标题", "评价"),
    "label": ("评价", "名称"),
    "title": ("name", "名称"),
    "passage": ("text", "content", "文本", "内容"),
}
"""Ambiguous column names: one is taken only where no other column and no other slot competes."""

_SAMPLE = 32
"""Number of records from which the content of a column is determined."""

_KEY = re.compile(r"(id|ids|key|keys|index|idx|uuid|hash|md5|sha1|url|path|编号|序号|编码|网址|链接)$", re.IGNORECASE)
"""Names of columns that identify a record."""

_CODE = re.compile(
    r"(?=.*\d)[\w./:\\#+-]{1,80}|\d{4}\D\d\d?\D\d\d? [\d:.]+|[0-9a-f]{6,64}|\S+\.[a-z0-9]{2,5}",
    re.IGNORECASE | re.ASCII,
)
"""A number, a code with digits, a date with a time, a hexadecimal number, a file name."""

_ORIGINS = ("split", "subset", "source", "dataset", "lang", "language", "来源", "数据集", "语言")
"""Names of columns with the origin of a record."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """Converts a record of the data to one with the task's slots as keys (other columns stay as they are)."""

    task: Task
    mapping: Mapping[str, str]

    @classmethod
    def of(
        cls, task: Task, records: Records, columns: Mapping[str, str] | None = None, command: str | None = None
    ) -> SlotView:
        """The view of these records for this task. Raises UsageError as `map_columns` does."""
        sample = [records[i] for i in range(min(_SAMPLE, len(records)))]
        if command is None:
            command = check_command(getattr(records, "name", "FILE"), task.name)
        return cls(task, map_columns(task, records.columns, columns or {}, sample, command))

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Record:
        """The record by slots. `rng` draws one of a list of texts; without it an input takes the first, and an output
        keeps the list (all are right). A picture's path is completed by the root of its source. Raises DataError for a
        picture that may not be read."""
        seen = dict(record)
        for name, column in self.mapping.items():
            value = record.get(column)
            kind = self.task.slots[name].type
            if kind == "messages":
                seen |= self._conversation(record, name, column)
                continue
            if kind == "image":
                value = _picture(value, str(record.get("_root") or ""), str(record.get("_where", "A record")))
            elif kind in ("text", "label"):
                value = _text(value) if kind == "text" else _label(_text(value))
                if isinstance(value, list) and (rng is not None or name in self.task.inputs):
                    value = value[0 if rng is None else int(rng.integers(len(value)))]
            if value is None:
                seen.pop(name, None)
            else:
                seen[name] = value
        return seen

    def _conversation(self, record: Record, slot: str, column: str) -> Record:
        where, root = str(record.get("_where", "A record")), str(record.get("_root") or "")
        try:
            messages = conversation_of(record, column)
        except DataError as error:
            raise DataError(f"{where}: {column}: {error}") from None
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [_with_path(part, root, where) for part in message["content"]]
        found = split_answer(messages)
        named = dict(zip((slot, *self.task.outputs[:1]), (found["messages"], found.get("answer")), strict=False))
        return {name: value for name, value in {**found, **named}.items() if value is not None}


def _with_path(part: Any, root: str, where: str) -> Any:
    if isinstance(part, Mapping) and part.get("type") == "image":
        return {**part, "image": _picture(part.get("image"), root, where)}
    return part


def map_columns(
    task: Task,
    columns: Iterable[str],
    mapping: Mapping[str, str],
    sample: Iterable[Record] = (),
    command: str = "openm6 data check FILE",
) -> dict[str, str]:
    """The column for every slot of the task: by `mapping`, else the same name, else an alias, else a usual name, else
    the only column of the slot's type (by `sample` records) that is neither a key nor known to be something else.

    Raises UsageError that names the slot, the columns, the most probable of them and the option that maps it: `command`
    with the missing options."""
    columns, rows = list(columns), list(islice(sample, _SAMPLE))
    for slot, column in mapping.items():
        if slot not in task.slots:
            raise UsageError(
                f"columns.{slot}: the task {task.name} has no slot {slot!r}.{suggest(slot, list(task.slots))} "
                f"It has: {', '.join(task.slots)}."
            )
        require_columns(columns, [column], f"columns.{slot}: the data")
    choice = _Choice(task, columns, rows, dict(mapping))
    if talk := next((name for name, slot in task.slots.items() if slot.type == "messages"), ""):
        key = mapping.get(talk) or next(filter(None, map(conversation_key, rows)), None)
        if key is None:
            raise UsageError(
                f"The task {task.name} needs conversations, and the data's columns ({_listed(columns)}) hold none: "
                "messages (OpenAI), conversations (ShareGPT, LLaVA), instruction with output (Alpaca), or query with "
                "response."
            )
        return {**mapping, talk: key}
    choice.take(lambda slot, kind: [c for c in columns if c == slot], ranked=True)
    choice.take(lambda slot, kind: choice.named((slot, *task.aliases.get(slot, ()))), ranked=True)
    choice.take(lambda slot, kind: choice.named(_synonyms(slot, kind))[: 1 if kind in ("image", "table") else None])
    choice.take(lambda slot, kind: choice.named(_POSSIBLE.get(kind if kind == "label" else slot, ())))
    choice.take(lambda slot, kind: choice.only_of_type(slot))
    for slot in choice.open():
        if not task.slots[slot].is_optional:
            raise UsageError(_advice(choice, slot, mapping, command))
    return {slot: choice.chosen[slot] for slot in task.slots if slot in choice.chosen}


def require_columns(columns: Iterable[str], names: Iterable[str], subject: str = "The data") -> None:
    """Raises UsageError for a name that is not one of the `columns` of the data."""
    has = list(columns)
    for name in names:
        if name not in has:
            raise UsageError(f"{subject} has no column {name!r}.{suggest(name, has)} It has: {_listed(has)}.")


def check_command(source: str, task: str, *options: str) -> str:
    """The shell command that checks data."""
    return shlex.join(["openm6", "data", "check", source, "--task", task, *options])


@dataclass(slots=True)
class _Choice:
    """Columns chosen step by step; `unclear` are slots with several equally probable columns."""

    task: Task
    columns: list[str]
    rows: list[Record]
    chosen: dict[str, str]
    unclear: dict[str, list[str]] = field(default_factory=dict)

    def open(self) -> list[str]:
        return [s for s, slot in self.task.slots.items() if s not in self.chosen and slot.type != "vector"]

    def take(self, candidates: Callable[[str, str], list[str]], ranked: bool = False) -> None:
        """One step: each open slot takes its candidate. Of several it takes the first if they are `ranked`, else none;
        nor does it take one for which other slots compete."""
        wanted = {}
        for slot in self.open():
            found = [c for c in candidates(slot, self.task.slots[slot].type) if c in self.free()]
            if found and slot not in self.unclear:
                wanted[slot] = found
        for slot, found in wanted.items():
            rivals = [other for other, columns in wanted.items() if set(columns) & set(found)]
            if ranked and set(found) & set(self.free()):
                self.chosen[slot] = next(c for c in found if c in self.free())
            elif not ranked and len(found) == len(rivals) == 1:
                self.chosen[slot] = found[0]
            elif not ranked:
                self.unclear[slot] = found

    def named(self, names: Iterable[str]) -> list[str]:
        """The free columns with these names, in their order, ignoring case and blanks at the ends."""
        return [c for name in dict.fromkeys(names) for c in self.free() if c.strip().casefold() == name.casefold()]

    def only_of_type(self, slot: str) -> list[str]:
        """The one free column, keys aside, whose values look like the slot's type, if the slot is the only open one of
        that type and the column is not known to be something else. A slot in a group, which may well have no column,
        neither takes one nor counts. A text that is constant over all records is no output."""
        kind, found = self.task.slots[slot].type, self.fitting(slot)
        open_slots = [self.task.slots[s] for s in self.open()]
        alone = sum(s.type == kind and not s.is_grouped for s in open_slots) == 1 and len(found) == 1
        alone = alone and not self.task.slots[slot].is_grouped
        if not alone or _foreign(found[0], slot, kind):
            return []
        values = [str(row.get(found[0])) for row in self.rows]
        constant = len(values) > 1 and len(set(values)) == 1
        return [] if constant and kind == "text" and slot in self.task.outputs else found

    def fitting(self, slot: str, keys: bool = False) -> list[str]:
        """The free columns whose values look like the slot's type, with or without `keys`."""
        kind = self.task.slots[slot].type
        values = {c: [row.get(c) for row in self.rows] for c in self.free()}
        return [c for c, some in values.items() if _looks_like(some, kind) and (keys or not is_key(c, some, kind))]

    def free(self) -> list[str]:
        return [c for c in self.columns if c not in self.chosen.values()]


def _foreign(column: str, slot: str, kind: str) -> bool:
    """True if a column has one of the usual names of something other than the slot."""
    known = [group for group in (*_SYNONYMS, _ORIGINS) if column.strip().casefold() in group]
    return bool(known) and not any(slot in group or kind in group for group in known)


def is_key(name: str, values: list[Any], kind: str) -> bool:
    """Whether a column, other than a picture's, identifies records: by its name, or by `values` of distinct codes."""
    if kind not in ("text", "label"):
        return False
    texts = [str(v) for v in values if v is not None]
    return bool(_KEY.search(name.strip())) or (
        len(set(texts)) == len(texts) and all(_CODE.fullmatch(text.strip()) for text in texts)
    )


def _synonyms(slot: str, kind: str) -> list[str]:
    names = [name for group in _SYNONYMS if slot in group for name in group]
    if kind in ("image", "label", "table"):
        names += next(group for group in _SYNONYMS if group[0] == kind)
    return names


def _advice(choice: _Choice, slot: str, mapping: Mapping[str, str], command: str) -> str:
    """The error message for a slot without a column."""
    likely, keys = choice.unclear.get(slot) or choice.fitting(slot), choice.fitting(slot, keys=True)
    column = likely[0] if likely else "COLUMN"
    hint = f" ({_listed(likely)} {'are as likely' if likely[1:] else 'is the likeliest'})" if likely else ""
    if keys and not likely:
        hint = f" ({_listed(keys)} {'looks like a key' if len(keys) == 1 else 'look like keys'})"
    options = [word for s, c in {**mapping, slot: column}.items() for word in ("-c", f"{s}={c}")]
    talk = next(filter(None, map(conversation_key, choice.rows)), None)
    told = f"The data hold conversations (under {talk!r}), which the task chat reads. " if talk else ""
    return told + (
        f"The task {choice.task.name} needs {slot} ([{choice.task.slots[slot].type}:{slot}]), and none of the data's "
        f"columns ({_listed(choice.columns)}) is taken for it{hint}: say which, by columns: {{{slot}: {column}}} in a "
        f"recipe, or by {command} {shlex.join(options)}"
    )


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(map(cut, columns))


def _looks_like(values: list[Any], kind: str) -> bool:
    values = [v for v in values if v is not None]
    if not values:
        return False
    if kind == "image":
        return all(isinstance(v, bytes) or (isinstance(v, str) and v.lower().endswith(PICTURES)) for v in values)
    if kind == "text":
        texts = [t for v in values for t in (v if isinstance(v, list) else [v])]
        return all(isinstance(t, str) and not t.lower().endswith(PICTURES) for t in texts)
    if kind == "label":
        return all(isinstance(v, (str, int)) and not str(v).lower().endswith(PICTURES) for v in values)
    return kind == "table" and all(isinstance(v, (dict, list)) for v in values)


def _text(value: Any) -> Any:
    """Convert numbers to text, and an empty list to None."""
    if isinstance(value, list):
        return [_text(v) for v in value] or None
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _label(value: Any) -> Any:
    """Normalize labels; an empty label becomes None."""
    if isinstance(value, list):
        return [label for label in map(_label, value) if label is not None] or None
    return (normalize_label(value) or None) if isinstance(value, str) else value


def picture_path(value: str, root: str) -> str:
    """A picture's path, completed by the root of its source; a URL stays as it is."""
    return join(root, value) if root and not is_remote(value) else value


def _picture(value: Any, root: str, where: str) -> Any:
    """A path completed by its root; a remote picture as bytes, read only from below the root."""
    if isinstance(value, list) and value and not isinstance(value[0], (int, list)):  # numbers are a picture's codes
        if len(value) > 1:
            raise DataError(f"{where} holds a list of {len(value)} pictures where the task reads one.")
        value = value[0]
    if not isinstance(value, str) or not value:
        return value
    if is_remote(value):
        if not (is_remote(root) and value.startswith(root.rstrip("/") + "/")) or ".." in value.split("/"):
            raise DataError(
                f"The picture {value} is elsewhere: to have it read, name the beginning of such addresses by images."
            )
        return read_file(value)
    path = picture_path(value, root)
    return read_file(path) if is_remote(path) else path


_SHOWN = 20
"""Maximum number of classes listed by name."""


@dataclass(slots=True)
class Classes:
    """The classes of a label slot: `counts` by class, and in `respelled` the class of every label spelt otherwise."""

    counts: Counter[str] = field(default_factory=Counter)
    respelled: dict[str, str] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Count the label of a record, or each of a list."""
        for text in value if isinstance(value, list) else [value]:
            label = normalize_label(str(text)) if isinstance(text, (str, int, float)) else ""
            if label:
                self.counts[label] += 1
                if label != str(text):
                    self.respelled[str(text)] = label

    def alike(self) -> list[list[str]]:
        """Classes that differ by case and blanks alone, which probably should be one."""
        groups: dict[str, list[str]] = {}
        for label in self.counts:
            groups.setdefault("".join(label.casefold().split()), []).append(label)
        return [sorted(group) for group in groups.values() if len(group) > 1]

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts.most_common()), "respelled": self.respelled, "alike": self.alike()}

    def sentences(self, name: str) -> list[str]:
        """Sentences about the classes of the slot `name`."""
        listed = ", ".join(f"{label} {count:,}" for label, count in self.counts.most_common(_SHOWN))
        more = f" and {len(self.counts) - _SHOWN:,} more" if len(self.counts) > _SHOWN else ""
        classes = f"{len(self.counts):,} class{'es' if len(self.counts) != 1 else ''}"
        said = [f"{name} has {classes}: {listed}{more}."]
        if self.respelled:
            text, label = next(iter(self.respelled.items()))
            count = len(self.respelled)
            said.append(f"{name}: spellings that are taken for a class: {count:,}, such as {text!r} for {label!r}.")
        said += [
            f"{name}: {' and '.join(map(repr, group))} differ in capitals or blanks alone."
            for group in self.alike()[:_SHOWN]
        ]
        return said


def count_classes(task: Task, records: Source, columns: Mapping[str, str]) -> dict[str, Classes]:
    """The classes of each label that the task writes, by slot, from all records."""
    names = [name for name in task.outputs if task.slots[name].type == "label"]
    mapping = SlotView.of(task, records, columns).mapping if names else {}
    found = {name: Classes() for name in names}
    some: Iterable[Record] = records if names else ()
    for record in some:
        for name in names:
            found[name].add(record.get(mapping[name]))
    return found
