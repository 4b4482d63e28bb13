"""Which ids a model has met in training, and which of those that new data have it has not.

The embedding of an id that was never met is still random, and an adapter beside the blocks cannot mend that. On reviews
of whose tokens a base had met 43%, LoRA alone ended at a loss of 0.25 to 0.31, with rows of the other tokens at 0.09 to
0.10, and all weights at 0.04 (three seeds).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from openm6.core.errors import DataError
from openm6.core.sequence import IGNORE, Sequence
from openm6.data.columns import SlotView
from openm6.data.loader import Entry
from openm6.data.store import Records
from openm6.tasks.card import read_taught
from openm6.tasks.encode import encode_example
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.train.checkpoint import latest_checkpoint
from openm6.train.distributed import Group
from openm6.train.setup import TOKENIZER_TEXTS, texts_of

ENCODED = 32
"""Records of a source that are encoded whole, pictures included."""


class Taught:
    """The ids that the model had met before a run, and those of the run's examples. Of a model whose ids nobody wrote
    down nothing is known, before or after."""

    def __init__(self, processor: Processor, output: Path, group: Group):
        self.group, known = group, processor.taught
        last = latest_checkpoint(output / "checkpoints")
        if last is not None and known is not None:  # the run goes on
            known |= read_taught(last) or frozenset()
        self._met = None if known is None else np.zeros(processor.tokenizer.vocab_size, bool)
        self.add_ids(known or ())

    def add(self, examples: Iterable[Sequence]) -> None:
        """Take in what one process trains on."""
        if self._met is not None:
            self._met[_ids_of(examples)] = True

    def add_ids(self, ids: Iterable[int]) -> None:
        if self._met is not None:
            self._met[list(ids)] = True

    def everywhere(self) -> frozenset[int] | None:
        """The ids that any process has met; every process calls it."""
        if self._met is None:
            return None
        met = self.group.sum(torch.from_numpy(self._met).int().to(self.group.device)).cpu()
        return frozenset(met.nonzero().flatten().tolist())


def untaught_ids(entries: list[Entry], processor: Processor) -> tuple[list[int], float]:
    """The ids of the entries' texts, and those around the texts of their first records as they are trained, that the
    model has not met; and the fraction of such ids among all tokens of the texts."""
    tokenizer, taught = processor.tokenizer, processor.taught
    if taught is None:
        return [], 0.0
    counts: Counter[int] = Counter()
    around: set[int] = set()
    for entry in entries:
        for task, columns in ((entry.task, entry.columns), (entry.against, entry.against_columns)):
            if task is None:
                continue
            around.update(_ids_of(_examples(task, entry.records, columns, processor)).tolist())
            for text in texts_of(task, entry.records, columns, TOKENIZER_TEXTS // len(entries)):
                try:
                    counts.update(tokenizer.encode(text))
                except DataError:
                    continue  # the loader rejects its record
    new = {number: count for number, count in counts.items() if number not in taught}
    around -= taught | {tokenizer.patch_id}  # the patches of a picture take the place of that one's row
    return sorted(around.union(new)), sum(new.values()) / max(1, counts.total())


def _examples(task: Task, records: Records, columns: Mapping[str, str], processor: Processor) -> Iterator[Sequence]:
    """The first records as they are trained: with masks, marks of tables, codes, and what else a task writes."""
    view, rng = SlotView.of(task, records, columns), np.random.default_rng(0)
    for number in range(min(len(records), ENCODED)):
        with suppress(DataError):  # the loader rejects the record
            yield encode_example(
                task, view(records[number], rng), processor, rng, another=lambda: view(records[0], rng)
            )


def _ids_of(examples: Iterable[Sequence]) -> np.ndarray:
    """The ids that the network reads or writes (the end of a text is written, never read)."""
    parts = [part for one in examples for part in (one.ids, one.labels)]
    ids = np.concatenate([np.empty(0, np.int32), *parts])
    return ids[ids != IGNORE]
