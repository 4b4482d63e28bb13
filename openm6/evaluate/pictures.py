"""Metrics of generated pictures without a downloaded network: attributes read by a judge, and its features.

The judge is a small M6 trained on one task, the attributes of a picture, with real pictures only (recipe judge). Real
and reconstructed pictures are measured too, for comparison.

    each attribute, all   fraction of the pictures in which the judge reads the prompted value
    relevance             mean probability that the judge assigns to all prompted attributes
    frechet               distance of Gaussians fitted to the judge's features of real and generated pictures (Heusel et
                          al. 2017); 0 is best; not comparable between judges
    precision, recall     fraction of generated pictures on the manifold of the real ones, and vice versa (Kynkaanniemi
                          et al. 2019, arXiv 1904.06991, k = 3)
    diversity             mean feature distance of two pictures with equal attributes, relative to real pictures
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
"""k of the nearest-neighbour radius around a picture (precision, recall)."""

Answer = Mapping[str, str]


class Judge:
    """A model with a `task` that has one picture slot, the picture to judge. Values of other input slots are `given`
    for each picture.
    """

    def __init__(self, session: Session, task: str = "product_attributes", batch_size: int = 64):
        self.session, self.task, self.batch_size = session, session.task(task), batch_size
        pictures = [name for name in self.task.inputs if self.task.slots[name].type == "image"]
        if len(pictures) != 1:
            raise UsageError(f"The task {task} has {len(pictures)} picture slots: a judge needs one.")
        self.slot = pictures[0]
        self.others = [name for name in self.task.inputs if name != self.slot]

    def _records(self, pictures: Items[Any], given: Items[Answer] | None) -> list[dict[str, Any]]:
        some = given if given is not None else [{}] * len(pictures)
        return [
            {self.slot: picture, **{name: values[name] for name in self.others if name in values}}
            for picture, values in zip(pictures, some, strict=True)
        ]

    def read(self, pictures: Items[Any], given: Items[Answer] | None = None) -> list[Answer]:
        """The judge's answer for each picture, by output slot."""
        records = self._records(pictures, given)
        found = list(self.session.run_many(self.task, records, batch_size=self.batch_size))
        only = self.task.outputs[0]
        return [answer if isinstance(answer, dict) else {only: answer} for answer in found]

    @torch.inference_mode()
    def features(self, pictures: Items[Any], given: Items[Answer] | None = None) -> Tensor:
        """The hidden state at the start of the judge's answer, fp32 [N, D]."""
        parts, records = [], self._records(pictures, given)
        pad_id, device = self.session.processor.tokenizer.pad_id, self.session.model.embed.weight.device
        for start in range(0, len(pictures), self.batch_size):
            prompts = [self.session.prompt(self.task, record) for record in records[start : start + self.batch_size]]
            batch = pad(prompts, pad_id).to(device)
            with self.session.precision():
                parts.append(prefill(self.session.model, batch, batch.ids.shape[1])[0].float().cpu())
        return torch.cat(parts)

    def relevance(self, pictures: Items[Any], wanted: Items[Answer]) -> Tensor:
        """Probability of the prompted answers `wanted` (which include given inputs), fp32 [N]."""
        records = [{self.slot: picture, **answer} for picture, answer in zip(pictures, wanted, strict=True)]
        return (-self.session.target_losses(self.task, records, self.batch_size)[0]).exp().float()


class Real:
    """Real pictures as the reference of the metrics, by the features of a judge."""

    def __init__(self, judge: Judge, pictures: Items[Any], given: Items[Answer] | None = None):
        self.judge, self.features = judge, judge.features(pictures, given)
        self.spread = _spread(self.features, judge.read(pictures, given))

    def measure(self, pictures: Items[Image.Image], wanted: Items[Answer]) -> dict[str, float]:
        """The metrics of pictures whose prompts have the attributes `wanted`."""
        if len(pictures) != len(wanted) or not pictures:
            raise DataError(f"{len(pictures)} pictures for {len(wanted)} prompts: one picture per prompt is needed.")
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
    """For each picture and attribute, True if the judge reads the prompted value; `all`: every attribute."""
    return compared(judge.read(pictures, wanted), wanted, judge.task.outputs)


def compared(read: Items[Answer], wanted: Items[Answer], names: Items[str]) -> list[dict[str, bool]]:
    """`judged` for answers that were read already."""
    rows = []
    for answer, right in zip(read, wanted, strict=True):
        row = {name: answer[name] == right[name] for name in names}
        rows.append({**row, "all": all(row.values())})
    return rows


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of the normal distributions with the means and covariances of features [N, D] and [M, D]."""
    real, drawn = real.double(), drawn.double()
    first, second = torch.cov(real.T), torch.cov(drawn.T)
    mixed = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    return float((real.mean(0) - drawn.mean(0)).square().sum() + first.trace() + second.trace() - 2 * mixed)


def share_among(points: Tensor, others: Tensor) -> float:
    """Fraction of `points` [N, D] within the NEIGHBOURS-nearest-neighbour radius of one of `others` [M, D]."""
    if len(others) <= NEIGHBOURS:
        raise DataError(f"{len(others)} pictures are too few: more than {NEIGHBOURS} are needed.")
    radius_M = torch.cdist(others, others).kthvalue(NEIGHBOURS + 1, dim=1).values  # itself is the nearest
    return float((torch.cdist(points, others) <= radius_M).any(1).float().mean())


def _spread(features: Tensor, labels: Items[Answer]) -> float:
    """Mean feature distance of two pictures with the same labels."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        groups[tuple(str(v) for v in label.values())].append(row)
    means = [float(torch.pdist(features[rows]).mean()) for rows in groups.values() if len(rows) > 1]
    return sum(means) / len(means) if means else 0.0


def read_prompts(
    session: Session, task: str | Task, judge: Judge, data: str, limit: int | None = None
) -> tuple[list[dict[str, Any]], list[Answer]]:
    """The first records of `data` by the slots of a task that draws, and the attributes of their pictures with the
    judge's other inputs."""
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
    """The metrics of real, reconstructed and generated pictures, of those drawn with `others` (name to decoding
    options), and, with several candidates, of the best by the model's own estimates; and the (best) generated pictures.

    Real and reconstructed pictures are measured against the real ones, which gives the values of a perfect model.
    """
    chosen = session.task(task)
    slot, codec = chosen.outputs[0], session.codec
    pictures = [as_square(record[slot], codec.size) for record in records]
    prompts = [{k: v for k, v in record.items() if k != slot} for record in records]
    same = {"seed": 0}  # repeatable
    options = {**same, **(decoding or {})}
    drawn = list(session.draw_many(chosen, prompts, candidates=candidates, decoding=options, truncate="start"))
    # The candidate drawn first is an unselected sample.
    any_one = [min(some, key=lambda candidate: candidate.number).image for some in drawn]
    real = Real(judge, pictures, wanted)
    rows = {
        "real": real.measure(pictures, wanted),
        "reconstructed": real.measure([codec.decode(codec.encode(p)) for p in pictures], wanted),
        "drawn": real.measure(any_one, wanted),
    }
    for name, other in (others or {}).items():
        found = list(session.run_many(chosen, prompts, decoding={**same, **other}, truncate="start"))
        rows[name] = real.measure(found, wanted)
    best = [some[0].image for some in drawn]
    if candidates > 1:
        rows[f"best of {candidates}"] = real.measure(best, wanted)
    return rows, best


def as_square(picture: Any, size: int) -> Image.Image:
    return Image.fromarray(read_square(picture, size))


def draw_sheet(pictures: Items[Image.Image], path: Path, columns: int = 12, rows: int = 4, scale: int = 2) -> None:
    """Write the first pictures side by side as a PNG."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures[: columns * rows]):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((scale * sheet.width, scale * sheet.height), Image.Resampling.NEAREST).save(path)
