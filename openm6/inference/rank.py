"""What a model draws: candidates, ranked by its own estimates and by reading them back."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from openm6._version import __version__
from openm6.core.bases import directory_hash
from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, UsageError
from openm6.core.files import dumps, plain
from openm6.core.images import ORIGIN, Features, as_file
from openm6.inference.draw import OPEN, Codes, Drawing, draw_steps, estimate, kept_codes
from openm6.inference.many import answer_groups
from openm6.inference.steps import Steps, finish, recounted
from openm6.tasks.drawn import ESTIMATES
from openm6.tasks.record import where
from openm6.tasks.task import Task

if TYPE_CHECKING:
    from openm6.inference.session import Session

Record = Mapping[str, Any]
T = TypeVar("T")

UNREAD = -1.0
"""Mean log-probability of a token of what was asked for, read from a candidate, below which it is uncertain.

Chosen on validation data of the demo's model, with studio pictures in the place of drawn ones: 60 captions of the
picture had -0.73 or more; 26 other wishes (English, other subjects, no words, contradictions), read from the best of
eight pictures, -2.7 or less. Of as many held-out ones: -0.50 or more, and -1.5 or less (an area under the ROC curve of
1.00); no caption of 60 is uncertain, all 26 others are, and 19 of 24 captions that are wrong in one attribute."""

SEEDS = 2**63
"""Seeds of pictures are below it, as the API takes them."""

TRUNCATE = "_truncate"
"""In a record: "start" where its longest text loses its beginning if it is longer than the model takes."""

KEPT = "_kept"
"""In a record of a task that draws: the codes that are given."""


def draw_many(
    session: Session,
    task: str | Task,
    records: Iterable[Record],
    *,
    candidates: int = 1,
    batch_size: int = 64,
    decoding: Mapping[str, Any] | None = None,
    on_error: str = "raise",
) -> Iterator[list[Candidate]]:
    """For each record `candidates` pictures of a task that draws, the best by the model's own estimates first.

    `decoding` overrides the task's options (see Drawing); without a seed a fresh one is drawn. Each picture has a seed
    of its own: the call's seed for the first one, and from there each the next number. A record may have codes that
    are given (KEPT). `on_error`: see Session.run_many.
    """
    task, options = options_of(session, task, candidates, decoding)

    def check(record: Record) -> Record:
        check_wish(task, record)
        session.prompt(task, record)
        kept_codes([record.get(KEPT)], _codes(session))
        return record

    def paint(wishes: list[Record], numbers: list[int]) -> list[list[Candidate]]:
        seeds = [options.seed + number * candidates for number in numbers]
        with session.precision():
            return finish(paint_steps(session, task, wishes, candidates, options, seeds))

    yield from answer_groups(records, max(1, batch_size // candidates), check, paint, on_error)


def options_of(
    session: Session, task: str | Task, candidates: int, decoding: Mapping[str, Any] | None
) -> tuple[Task, Drawing]:
    """The task and how it is drawn, by a fresh seed where none is given. Raises UsageError for what cannot be."""
    task = drawing_task(session, task)
    if decoding and int(decoding.get("branches", 1)) > 1:
        decoding = in_passes(task, decoding)
    options = Drawing.of(**{"seed": fresh_seed(), **task.decode, **(decoding or {})})
    if options.guidance and not _droppable(task):
        raise UsageError(f"The task {task.name} has no slot that can be dropped: guidance has nothing to leave.")
    if candidates < 1:
        raise UsageError(f"candidates is {candidates}; draw 1 or more.")
    return task, options


def fresh_seed() -> int:
    """A random seed for a request that has none, below 2**31."""
    return secrets.randbelow(2**31)


def check_wish(task: Task, record: Record) -> None:
    """Raises DataError for a record that asks for nothing: a text of blanks, or no slot at all and no codes that are
    kept."""
    for name in task.inputs:
        value = record.get(name)
        if task.slots[name].type == "text" and isinstance(value, str) and value and not value.strip():
            raise DataError(f"{where(record)}{name}: holds blanks alone.", param=name)
    if record.get(KEPT) is None and not task.asked(record):
        raise DataError(f"{where(record)}nothing is asked for: give {' or '.join(task.inputs)}.")


def _droppable(task: Task) -> set[str]:
    return {name for name in task.inputs if task.slots[name].drop}


def paint_steps(
    session: Session, task: Task, records: list[Record], candidates: int, options: Drawing, seeds: Sequence[int]
) -> Steps[list[list[Candidate]]]:  # fmt: skip
    """Of each record its candidates, the best first. `seeds`: of each record its first picture's, from which the others
    of that record count on. A step costs a record what it costs all its candidates."""
    codec, codes, droppable = session.codec, _codes(session), _droppable(task)

    def in_parts(items: list[T]) -> list[list[T]]:
        return [items[start : start + candidates] for start in range(0, len(items), candidates)]

    prompts = [prompt for r in records for prompt in [session.prompt(task, r)] * candidates]
    free = [session.prompt(task, {k: v for k, v in r.items() if k not in droppable}) for r in records]
    free = [prompt for prompt in free for _ in range(candidates)]
    asked = [r for r in records for _ in range(candidates)]
    kept = kept_codes([r.get(KEPT) for r in asked], codes)
    own = [(seed + number) % SEEDS for seed in seeds for number in range(candidates)]
    steps = draw_steps(session.model, prompts, free, codes, options, kept, own)
    drawn = yield from recounted(steps, lambda counts: [sum(part) for part in in_parts(counts)])
    yield [0] * len(records)
    rows = zip(drawn.codes.cpu().numpy(), drawn.estimates.tolist(), drawn.score(options).tolist(), strict=True)
    made = [
        Candidate(codec.decode(row), place % candidates, row, dict(zip(ESTIMATES, told, strict=True)), score, seed)
        for place, ((row, told, score), seed) in enumerate(zip(rows, own, strict=True))
    ]
    for record, some in zip(records, in_parts(made), strict=True):
        origin = _origin(session, task, record)
        for one in some:
            own_options = {**asdict(options), "seed": one.seed}
            one.image.info[ORIGIN] = dumps({**origin, "number": one.number, "options": own_options}, plain)
    if options.reading:
        yield [0] * len(records)
        made = _read_back(session, task, made, asked, options.reading)
    return [sorted(part, key=lambda p: -p.score) for part in in_parts(made)]


def _origin(session: Session, task: Task, record: Record) -> dict[str, Any]:
    """What is drawn of a record, without any path: a picture that it was asked with is named by the SHA-256 of its
    file; `kept` is the number of codes that were given."""
    given = task.asked(record)
    for name in (name for name in given if task.slots[name].type == "image"):
        features = Features.of(given[name])
        content = as_file(given[name]) if features is None else features.data
        given[name] = {"sha256": hashlib.sha256(content).hexdigest()}
    kept = record.get(KEPT)
    told = {
        "openm6": __version__, "model": _model_hash(session.path), "adapter": session.active_adapter, "task": task.name,
        "slots": given, "truncate": record.get(TRUNCATE),
        "kept": 0 if kept is None else int((np.asarray(kept) != OPEN).sum()),
    }  # fmt: skip
    return {name: value for name, value in told.items() if value not in ("", None)}


def _model_hash(path: Path | None) -> str:
    if path is None:
        return ""
    state = path.stat()
    return _hash_once(path, state.st_ino, state.st_mtime_ns)


@lru_cache
def _hash_once(path: Path, *state: int) -> str:
    """The hash of a directory in this state: it takes a second for some billions of weights."""
    return directory_hash(path)


def _read_back(
    session: Session, task: Task, made: list[Candidate], asked: list[Record], weight: float
) -> list[Candidate]:
    """The pictures, where the model has learned the task's reader and there was asked for what it writes with the
    log-probability of writing it from the picture (`reading`) among the estimates and in the score."""
    reader = session.tasks.get(task.reader)
    if reader is None:
        return made
    places = [i for i, record in enumerate(asked) if all(record.get(n) is not None for n in reader.outputs)]
    picture = next((name for name in reader.inputs if reader.slots[name].type == "image"), None)
    if picture is None:
        raise UsageError(f"The reader of the task {task.name}, {reader.name}, takes no picture.")
    records = [{picture: made[i].image, **{n: asked[i][n] for n in reader.outputs}} for i in places]
    losses, counts = session.target_losses(reader, records)
    for i, value, each in zip(places, (-losses).tolist(), (-losses / counts).tolist(), strict=True):
        told = {**made[i].estimates, "reading": value}
        score = made[i].score + weight * value
        made[i] = replace(made[i], estimates=told, score=score, uncertain=each < UNREAD)
    return made


def relevance_by_slot(
    session: Session, task: str | Task, drawn: list[Candidate], **slots: Any
) -> dict[str, list[float]]:
    """How well pictures follow each given slot that may be dropped, by itself: log-odds by slot. Where what was
    asked for contradicts itself it tells which part won."""
    task = drawing_task(session, task)
    codes = torch.from_numpy(np.stack([candidate.codes for candidate in drawn]))
    found, droppable = {}, _droppable(task)
    for name in (name for name in task.inputs if name in droppable):
        if slots.get(name) is None:
            continue
        alone = session.prompt(task, {k: v for k, v in slots.items() if k == name or k not in droppable})
        with session.precision():
            told = estimate(session.model, [alone] * len(codes), codes, _codes(session)).estimates
        found[name] = told[:, ESTIMATES.index("relevance")].tolist()
    return found


def drawing_task(session: Session, task: str | Task) -> Task:
    task = session.task(task)
    task.check_draws()
    return task


def _codes(session: Session) -> Codes:
    codec, tokenizer = session.codec, session.processor.tokenizer
    return Codes(
        tokenizer.code_start, codec.num_codes, codec.side**2, tokenizer.mask_id, tokenizer.estimate_ids,
        tokenizer.yes_id, tokenizer.no_id,
    )  # fmt: skip


def in_passes(task: Task, decoding: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options, in passes where they do not say otherwise, though the task draws one code after the other."""
    return {"passes": task.decode.get("passes") or Drawing().passes, **(decoding or {})}
