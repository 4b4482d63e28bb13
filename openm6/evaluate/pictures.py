"""Measures of drawn pictures without any downloaded network: what a judge reads in them, and how its features spread.

The judge is a small M6 of its own that has learned one task, the attributes of a picture, from real pictures alone
(recipes/judge.yaml). Its opinion of real pictures, and of those that only went through the codec, stands beside.

    each attribute, all   share of the pictures in which the judge reads what was asked for
    relevance             mean probability that the judge gives to all attributes asked for
    frechet               distance of two Gaussians fitted to the judge's features of real and drawn pictures (Heusel et
                          al. 2017); 0 is best, and figures of different judges do not compare
    precision, recall     share of drawn pictures that lie among the real ones, and of real ones among the drawn
                          (Kynkaanniemi et al. 2019, arXiv 1904.06991, k = 3)
    diversity             mean distance of the features of two pictures of the same attributes, over that of real ones
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence as Items
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openm6.core.batch import pad
from openm6.core.errors import DataError, UsageError
from openm6.core.images import read_square
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.model.cache import prefill
from openm6.tasks.task import Task

NEIGHBOURS = 3
"""Whose farthest one is the radius around a picture within which others count as alike."""

Answer = Mapping[str, str]


class Judge:
    """A model that answers `task`, whose one picture slot is what is judged.

    Its other inputs, if it has any (which garment of those that are worn), are `given`: slot values for each picture.
    """

    def __init__(self, session: Session, task: str = "product_attributes", batch_size: int = 64):
        self.session, self.task, self.batch_size = session, session.task(task), batch_size
        pictures = [name for name in self.task.inputs if self.task.slots[name].type == "image"]
        if len(pictures) != 1:
            raise UsageError(f"The task {task} has {len(pictures)} pictures: a judge looks at one.")
        self.slot = pictures[0]
        self.others = [name for name in self.task.inputs if name != self.slot]

    def _records(self, pictures: Items[Any], given: Items[Answer] | None) -> list[dict[str, Any]]:
        some = given if given is not None else [{}] * len(pictures)
        return [
            {self.slot: picture, **{name: told[name] for name in self.others if name in told}}
            for picture, told in zip(pictures, some, strict=True)
        ]

    def read(self, pictures: Items[Any], given: Items[Answer] | None = None) -> list[Answer]:
        """What the judge sees, by output slot."""
        records = self._records(pictures, given)
        found = list(self.session.run_many(self.task, records, batch_size=self.batch_size))
        only = self.task.outputs[0]
        return [answer if isinstance(answer, dict) else {only: answer} for answer in found]

    @torch.inference_mode()
    def features(self, pictures: Items[Any], given: Items[Answer] | None = None) -> Tensor:
        """The hidden state from which the judge starts its answer, fp32 [N, D]."""
        parts, records = [], self._records(pictures, given)
        pad_id, device = self.session.processor.tokenizer.pad_id, self.session.model.embed.weight.device
        for start in range(0, len(pictures), self.batch_size):
            prompts = [self.session.prompt(self.task, record) for record in records[start : start + self.batch_size]]
            batch = pad(prompts, pad_id).to(device)
            with self.session.precision():
                parts.append(prefill(self.session.model, batch, batch.ids.shape[1])[0].float().cpu())
        return torch.cat(parts)

    def relevance(self, pictures: Items[Any], wanted: Items[Answer]) -> Tensor:
        """Probability of the answers asked for (with them, what is given), fp32 [N]."""
        records = [{self.slot: picture, **answer} for picture, answer in zip(pictures, wanted, strict=True)]
        return (-self.session.target_losses(self.task, records, self.batch_size)[0]).exp().float()


class Real:
    """Real pictures, as a judge sees them, to measure others against."""

    def __init__(self, judge: Judge, pictures: Items[Any], given: Items[Answer] | None = None):
        self.judge, self.features = judge, judge.features(pictures, given)
        self.spread = _spread(self.features, judge.read(pictures, given))

    def measure(self, pictures: Items[Image.Image], wanted: Items[Answer]) -> dict[str, float]:
        """The measures above of pictures which were to show what `wanted` says."""
        if len(pictures) != len(wanted) or not pictures:
            raise DataError(f"{len(pictures)} pictures for {len(wanted)} wishes: there has to be one for each.")
        right, features = judged(self.judge, pictures, wanted), self.judge.features(pictures, wanted)
        return {
            **{name: sum(r[name] for r in right) / len(right) for name in right[0]},
            "relevance": float(self.judge.relevance(pictures, wanted).mean()),
            "frechet": frechet(self.features, features),
            "precision": share_among(features, self.features),
            "recall": share_among(self.features, features),
            "diversity": _spread(features, wanted) / max(1e-9, self.spread),
        }


def judged(judge: Judge, pictures: Items[Any], wanted: Items[Answer]) -> list[dict[str, bool]]:
    """Of each picture and attribute whether the judge reads what was asked for; `all`: every one."""
    return compared(judge.read(pictures, wanted), wanted, judge.task.outputs)


def compared(read: Items[Answer], wanted: Items[Answer], names: Items[str]) -> list[dict[str, bool]]:
    """The same of what was read already."""
    rows = []
    for answer, wish in zip(read, wanted, strict=True):
        row = {name: answer[name] == wish[name] for name in names}
        rows.append({**row, "all": all(row.values())})
    return rows


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of the normal distributions with the means and covariances of features [N, D] and [M, D]."""
    real, drawn = real.double(), drawn.double()
    first, second = torch.cov(real.T), torch.cov(drawn.T)
    mixed = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    return float((real.mean(0) - drawn.mean(0)).square().sum() + first.trace() + second.trace() - 2 * mixed)


def share_among(points: Tensor, others: Tensor) -> float:
    """Share of `points` [N, D] that lie within the radius of one of `others` [M, D], to the third nearest of them."""
    if len(others) <= NEIGHBOURS:
        raise DataError(f"{len(others)} pictures are too few: more than {NEIGHBOURS} are needed.")
    radius_M = torch.cdist(others, others).kthvalue(NEIGHBOURS + 1, dim=1).values  # itself is the nearest
    return float((torch.cdist(points, others) <= radius_M).any(1).float().mean())


def _spread(features: Tensor, labels: Items[Answer]) -> float:
    """Mean distance of two pictures with the same labels."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        groups[tuple(str(v) for v in label.values())].append(row)
    means = [float(torch.pdist(features[rows]).mean()) for rows in groups.values() if len(rows) > 1]
    return sum(means) / len(means) if means else 0.0


def read_wishes(
    session: Session, task: str | Task, judge: Judge, data: str, limit: int | None = None
) -> tuple[list[dict[str, Any]], list[Answer]]:
    """The first records of `data` by the slots of a task that draws, and the attributes that their pictures have (and
    what the judge is given beside a picture)."""
    chosen, source = session.task(task), open_source(data)
    draws, reads = SlotView.of(chosen, source), SlotView.of(judge.task, source)
    records: list[dict[str, Any]] = []
    wanted: list[Answer] = []
    for record in islice(source, limit):
        records.append({k: v for k, v in draws(record).items() if k in chosen.slots})
        seen = reads(record)
        wanted.append({name: seen[name] for name in (*judge.others, *judge.task.outputs)})
    return records, wanted


def measure_drawing(
    session: Session,
    task: str | Task,
    judge: Judge,
    records: list[dict[str, Any]],
    wanted: list[Answer],
    candidates: int = 1,
    decoding: Mapping[str, Any] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, dict[str, float]], list[Image.Image]]:
    """The measures of real pictures, of reconstructed ones, of drawn ones, of those drawn in `others` ways (name to
    options), and, with several candidates, of the best of each by the model's own estimates; and the pictures drawn
    (the best ones).

    Real and reconstructed pictures are measured against the real ones too: what a perfect drawing would get.
    """
    chosen = session.task(task)
    slot, codec = chosen.outputs[0], session.codec
    pictures = [as_square(record[slot], codec.size) for record in records]
    wishes = [{k: v for k, v in record.items() if k != slot} for record in records]
    same = {"seed": 0}  # two measurements give the same figures
    options = {**same, **(decoding or {})}
    drawn = list(session.draw_many(chosen, wishes, candidates=candidates, decoding=options, truncate="start"))
    # In the order in which they were drawn, the first one is as good as any.
    any_one = [min(some, key=lambda candidate: candidate.number).image for some in drawn]
    real = Real(judge, pictures, wanted)
    rows = {
        "real": real.measure(pictures, wanted),
        "reconstructed": real.measure([codec.decode(codec.encode(p)) for p in pictures], wanted),
        "drawn": real.measure(any_one, wanted),
    }
    for name, other in (others or {}).items():
        found = list(session.run_many(chosen, wishes, decoding={**same, **other}, truncate="start"))
        rows[name] = real.measure(found, wanted)
    best = [some[0].image for some in drawn]
    if candidates > 1:
        rows[f"best of {candidates}"] = real.measure(best, wanted)
    return rows, best


def as_square(picture: Any, size: int) -> Image.Image:
    return Image.fromarray(read_square(picture, size))


def draw_sheet(pictures: Items[Image.Image], path: Path, columns: int = 12, rows: int = 4, scale: int = 2) -> None:
    """The first pictures side by side, as PNG."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures[: columns * rows]):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((scale * sheet.width, scale * sheet.height), Image.Resampling.NEAREST).save(path)
