"""Learning from a larger model (recipe key `distill`): its distribution at every trained position, and which positions
it sees as alike.

The teacher reads the very batch that the student reads, so both need the same tokenizer and the same grid of patches;
sizes, layers and experts may differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from openm6.batches import Batch
from openm6.bundle import Bundle
from openm6.errors import UsageError
from openm6.model.loss import Teacher
from openm6.sequence import IGNORE
from openm6.tasks.processor import Processor
from openm6.train.recipe import DistillSection


class Lessons:
    """What a teacher says of batches."""

    def __init__(self, settings: DistillSection, student: Processor, device: torch.device):
        """Raises UsageError for a teacher that reads otherwise than the student."""
        self.settings = settings
        self.bundle = Bundle.load(settings.teacher, device)
        theirs = self.bundle.processor
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
        with torch.autocast(batch.ids.device.type, enabled=False), self.bundle.precision():
            hidden_BTE = self.bundle.model(unlabelled).hidden
        chosen = hidden_BTE.flatten(0, 1)[trained]

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False), self.bundle.precision():
                return self.bundle.model.logits(chosen[part])

        return Teacher(logits, self.settings.share, self.settings.temperature), hidden_BTE


def relation_loss(student_BTD: Tensor, teacher_BTE: Tensor, segments_BT: Tensor) -> Tensor:
    """Mean square difference of the cosines between positions of one example: which of them a network sees as alike,
    whatever its width (relational distillation, Park et al. 2019, arXiv 1904.05068)."""
    alike = [torch.nn.functional.normalize(h.float(), dim=-1) for h in (student_BTD, teacher_BTE)]
    student_BTT, teacher_BTT = (h @ h.mT for h in alike)
    real_BTT = (segments_BT[:, :, None] == segments_BT[:, None]) & (segments_BT[:, :, None] > 0)
    return (student_BTT - teacher_BTT)[real_BTT].square().mean()
