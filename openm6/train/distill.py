"""Distillation (recipe key `distill`): the student learns the teacher's distribution at every trained position, and
the similarities between its positions.

Teacher and student read the same batch, so both need the same tokenizer, the same grid of patches, and read a source in
the same way; sizes, layers and experts may differ.
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


class DistillationTeacher:
    """A larger model, and its outputs for the batches of a student."""

    def __init__(self, settings: DistillSection, student: Processor, device: torch.device):
        """Raises UsageError for a teacher whose tokenizer, grid of patches or source differs from the student's."""
        self.settings = settings
        self.session = Session.load(settings.teacher, device)
        teacher = self.session.processor
        if not teacher.tokenizer.is_like(student.tokenizer):
            raise UsageError(
                f"The teacher {settings.teacher} has another tokenizer than the student: give tokenizer.path "
                f"{settings.teacher}, or leave it out."
            )
        if teacher.grid != student.grid:
            raise UsageError(
                f"The teacher {settings.teacher} cuts a picture into at most {teacher.grid.max_patches} patches of "
                f"{teacher.grid.stride} pixels, the student into {student.grid.max_patches} of {student.grid.stride}: "
                "they have to be alike (model.sizes.image_max_patches)."
            )
        if teacher.source != student.source:
            raise UsageError(
                f"The teacher {settings.teacher} has a {teacher.source} source, the student a {student.source} one: "
                "they have to be alike (model.sizes.source)."
            )

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Teacher, Tensor]:
        """The teacher's distribution at the trained positions, and its hidden states [B, T, E]."""
        trained = (batch.labels != IGNORE).flatten().nonzero().squeeze(1)
        unlabelled = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
        with torch.autocast(batch.ids.device.type, enabled=False), self.session.precision():
            hidden_BTE = self.session.model(unlabelled).hidden
        chosen = hidden_BTE.flatten(0, 1)[trained]

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False), self.session.precision():
                return self.session.model.logits(chosen[part])

        return Teacher(logits, self.settings.weight, self.settings.temperature), hidden_BTE


def relation_loss(student_BTD: Tensor, teacher_BTE: Tensor, segments_BT: Tensor) -> Tensor:
    """Mean square difference of the cosine similarities between positions of one example, which do not depend on the
    network's width (relational distillation, Park et al. 2019, arXiv 1904.05068)."""
    unit = [torch.nn.functional.normalize(h.float(), dim=-1) for h in (student_BTD, teacher_BTE)]
    student_BTT, teacher_BTT = (h @ h.mT for h in unit)
    real_BTT = (segments_BT[:, :, None] == segments_BT[:, None]) & (segments_BT[:, :, None] > 0)
    return (student_BTT - teacher_BTT)[real_BTT].square().mean()


AT_ONCE = 256
"""Records that a teacher answers between two writes to its file."""


class _AnsweredRecords:
    """Records with the teacher's answers, by slot name, in place of any of their own; records without an answer are
    left out."""

    def __init__(self, records: Records, outputs: Iterable[str], answers: list[Mapping[str, object]]):
        self._records, self._answers = records, answers
        self._places = [place for place, answer in enumerate(answers) if all(answer.values())]
        self.columns = tuple(dict.fromkeys((*records.columns, *outputs)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        place = self._places[index]
        return {**self._records[place], **self._answers[place]}


def teacher_answers(
    source: Source, task: Task, columns: Mapping[str, str], teacher: Path, output: Path, group: Group
) -> Source:
    """A source with a teacher's answers. They are stored in `output`, keyed by the contents of source, task and
    teacher, and an interrupted run resumes there.

    Records that the teacher cannot read, or gives an empty answer to, are left out. Raises UsageError for a task that
    is not answered in text."""
    if task.embeds or task.head or task.draws or task.sketch:
        raise UsageError(f"{source.name}: the task {task.name} is not answered in text, which a teacher could write.")
    key = json_hash([source.content_hash(), task.to_dict(), dict(columns), directory_hash(teacher)])[:12]
    file = output / "answers" / f"{task.name}-{key}.jsonl"
    if group.first:
        _answer(source, task, columns, teacher, file)
    group.wait()
    found = _AnsweredRecords(source, task.outputs, list(whole_lines(file)))
    if not len(found):
        raise DataError(f"The teacher {teacher} gives no answer to any record of {source.name}.")
    return Source(source.name, found)


def _answer(source: Source, task: Task, columns: Mapping[str, str], teacher: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = list(whole_lines(file))
    if len(whole) >= len(source):
        return
    session = Session.load(teacher)
    blank = dict.fromkeys(task.outputs, "-")  # so that every slot finds a column
    view = SlotView.of(task, _AnsweredRecords(source, task.outputs, [blank] * len(source)), columns)
    # An incomplete last block is written again.
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
    """A line of JSON for each record, with null for one that the teacher cannot read. `start`: number of the first
    record in the source, which seeds the random numbers."""
    prompts = [_readable_inputs(session, task, record) for record in records]
    good, seed = [one for one in prompts if one is not None], seed_of(task.decode.get("seed", 0), start)
    found = iter(session.run_many(task, good, decoding={"seed": seed}))
    for one in prompts:
        value = None if one is None else next(found)
        several = len(task.outputs) > 1 and value is not None
        yield dumps(value if several else dict.fromkeys(task.outputs, value)) + "\n"


def _readable_inputs(session: Session, task: Task, record: Record) -> Record | None:
    inputs = task.asked(record)
    try:
        session.prepare(task, inputs)
    except DataError:
        return None
    return inputs
