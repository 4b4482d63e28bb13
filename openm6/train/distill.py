"""Learning from a larger model (recipe key `distill`): its distribution at every trained position, and which positions
it sees as alike.

The teacher reads the very batch that the student reads, so both need the same tokenizer and the same grid of patches;
sizes, layers and experts may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openm6.core.bases import directory_hash
from openm6.core.batch import Batch
from openm6.core.errors import DataError, UsageError
from openm6.core.files import dumps, sync, whole_lines, write_text
from openm6.core.sequence import IGNORE
from openm6.data.columns import SlotView
from openm6.data.digest import json_hash
from openm6.data.source import Source
from openm6.data.store import Record, Records, shown
from openm6.inference.session import Session
from openm6.model.loss import Teacher
from openm6.studio.review import seed_of
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.train.distributed import Group
from openm6.train.recipe import DistillSection


class Lessons:
    """What a teacher says of batches."""

    def __init__(self, settings: DistillSection, student: Processor, device: torch.device):
        """Raises UsageError for a teacher that reads otherwise than the student."""
        self.settings = settings
        self.session = Session.load(settings.teacher, device)
        theirs = self.session.processor
        if not theirs.tokenizer.is_like(student.tokenizer):
            raise UsageError(
                f"The teacher {settings.teacher} has another tokenizer than the student: give tokenizer.path "
                f"{settings.teacher}, or leave it out."
            )
        if theirs.grid != student.grid:
            raise UsageError(
                f"The teacher {settings.teacher} cuts a picture into at most {theirs.grid.max_patches} patches of "
                f"{theirs.grid.stride} pixels, the student into {student.grid.max_patches} of {student.grid.stride}: "
                "they have to be alike (model.sizes.image_max_patches)."
            )

    @torch.no_grad()
    def of(self, batch: Batch) -> tuple[Teacher, Tensor]:
        """Its distribution at the trained positions, and its hidden states [B, T, E]."""
        trained = (batch.labels != IGNORE).flatten().nonzero().squeeze(1)
        unlabelled = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
        with torch.autocast(batch.ids.device.type, enabled=False), self.session.precision():
            hidden_BTE = self.session.model(unlabelled).hidden
        chosen = hidden_BTE.flatten(0, 1)[trained]

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False), self.session.precision():
                return self.session.model.logits(chosen[part])

        return Teacher(logits, self.settings.share, self.settings.temperature), hidden_BTE


def relation_loss(student_BTD: Tensor, teacher_BTE: Tensor, segments_BT: Tensor) -> Tensor:
    """Mean square difference of the cosines between positions of one example: which of them a network sees as alike,
    whatever its width (relational distillation, Park et al. 2019, arXiv 1904.05068)."""
    alike = [torch.nn.functional.normalize(h.float(), dim=-1) for h in (student_BTD, teacher_BTE)]
    student_BTT, teacher_BTT = (h @ h.mT for h in alike)
    real_BTT = (segments_BT[:, :, None] == segments_BT[:, None]) & (segments_BT[:, :, None] > 0)
    return (student_BTT - teacher_BTT)[real_BTT].square().mean()


AT_ONCE = 256
"""Records that a teacher answers between two lines of its file."""


class _Answered:
    """Records with the teacher's answers, by the slots' names, in the place of any of their own; those that it says
    nothing to are left out."""

    def __init__(self, records: Records, outputs: Iterable[str], answers: list[Mapping[str, object]]):
        self._records, self._answers = records, answers
        self._places = [place for place, answer in enumerate(answers) if all(answer.values())]
        self.columns = tuple(dict.fromkeys((*records.columns, *outputs)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        place = self._places[index]
        return {**self._records[place], **self._answers[place]}


def answered(
    source: Source, task: Task, columns: Mapping[str, str], teacher: Path, output: Path, group: Group
) -> Source:
    """A source without answers, with those of a teacher. They are kept in `output`, where a run that was killed goes
    on, for these contents of the source, the task and the teacher.

    A record that the teacher cannot read, or says nothing to, is left out. Raises UsageError for a task that is not
    answered in words.
    """
    if task.embeds or task.head or task.draws or task.sketch:
        raise UsageError(f"{source.name}: the task {task.name} is not answered in words, which a teacher could write.")
    key = json_hash([source.content_hash(), task.to_dict(), dict(columns), directory_hash(teacher)])[:12]
    file = output / "answers" / f"{task.name}-{key}.jsonl"
    if group.first:
        _answer(source, task, columns, teacher, file)
    group.wait()
    found = _Answered(source, task.outputs, list(whole_lines(file)))
    if not len(found):
        raise DataError(f"The teacher {teacher} says nothing to any record of {source.name}.")
    return Source(source.name, found)


def _answer(source: Source, task: Task, columns: Mapping[str, str], teacher: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = list(whole_lines(file))
    if len(whole) >= len(source):
        return
    session = Session.load(teacher)
    blank = dict.fromkeys(task.outputs, "-")  # so that every slot finds a column
    view = SlotView.of(task, _Answered(source, task.outputs, [blank] * len(source)), columns)
    # What a kill left of the last part is written anew.
    begun = len(whole) // AT_ONCE * AT_ONCE
    write_text(file, "".join(dumps(line) + "\n" for line in whole[:begun]))
    rest = range(begun, len(source))
    part: list[int] = []
    with file.open("a", encoding="utf-8") as stream:
        for number in shown(rest, len(rest), f"{teacher} answers {source.name}"):
            part.append(number)
            if len(part) == AT_ONCE or number == rest[-1]:
                stream.writelines(_answers(session, task, [view({**source[one], **blank}) for one in part], part[0]))
                sync(stream)
                part = []


def _answers(session: Session, task: Task, records: list[Record], start: int) -> Iterator[str]:
    """A line of JSON for each record; without a value where the teacher cannot read it. `start`: the number of the
    first record in the source, of which its random numbers are."""
    prompts = [_readable(session, task, record) for record in records]
    good, seed = [one for one in prompts if one is not None], seed_of(task.decode.get("seed", 0), start)
    found = iter(session.run_many(task, good, decoding={"seed": seed}))
    for one in prompts:
        value = None if one is None else next(found)
        several = len(task.outputs) > 1 and value is not None
        yield dumps(value if several else dict.fromkeys(task.outputs, value)) + "\n"


def _readable(session: Session, task: Task, record: Record) -> Record | None:
    inputs = task.asked(record)
    try:
        session.prepare(task, inputs)
    except DataError:
        return None
    return inputs
