"""Probabilities of given answers: of each label of a closed set, and of the outputs that records have."""

from __future__ import annotations

from collections.abc import Sequence as Items
from copy import copy
from itertools import groupby
from typing import Any

import torch

from openm6.core.batch import by_length, pad
from openm6.core.errors import UsageError
from openm6.core.sequence import Sequence
from openm6.inference.decoding import check_room
from openm6.inference.generate import read_text, text_steps
from openm6.inference.request import (
    BATCH_SIZE,
    Answer,
    Context,
    Mode,
    Prepared,
    Record,
    Request,
    text_options,
)
from openm6.inference.steps import Steps
from openm6.model import M6
from openm6.model.cache import KVCache, prefill, step
from openm6.tasks import target
from openm6.tasks.encode import encode_example
from openm6.tasks.processor import Processor
from openm6.tasks.record import labels_of
from openm6.tasks.task import Task

Prefix = tuple[int, ...]


def closed_labels(task: Task) -> tuple[str, ...]:
    """The labels of a task whose only output is a label of a closed set; () for other tasks."""
    return task.labels.get(task.outputs[0], ()) if len(task.outputs) == 1 else ()


def require_labels(task: Task, record: Record) -> tuple[str, ...]:
    """The labels that the only output of a task can have for a record (see `labels_of`). Raises UsageError where they
    are unknown."""
    labels = labels_of(task, record, task.outputs[0]) if len(task.outputs) == 1 else ()
    if not labels:
        raise UsageError(f"The task {task.name} has no probabilities: its one output has to be a label of a set.")
    return labels


class LabelTree:
    """A prefix tree of the tokens of the labels of a task's output, each with the end token.

    paths    tokens of each label
    forks    prefixes after which several labels continue, with the tokens that continue them
    levels   prefixes that the network has to read to reach the forks, grouped by length from 0 on
    """

    def __init__(self, task: Task, processor: Processor, labels: Items[str]):
        side, tokenizer = task.instructions[0].target, processor.tokenizer
        self.paths: dict[str, Prefix] = {}
        for label in labels:
            ids = target.join(side, {task.outputs[0]: tokenizer.encode_often(label)}, tokenizer)
            self.paths[label] = (*ids, tokenizer.end_id)
        choices: dict[Prefix, dict[int, None]] = {}
        for path in self.paths.values():
            for length, token in enumerate(path):
                choices.setdefault(path[:length], {})[token] = None
        self.forks = {prefix: list(tokens) for prefix, tokens in choices.items() if len(tokens) > 1}
        read = sorted({fork[:n] for fork in self.forks for n in range(len(fork) + 1)}, key=lambda p: (len(p), p))
        self.levels = [list(level) for _, level in groupby(read, len)]

    @property
    def width(self) -> int:
        """Maximum number of rows that one prompt takes at once."""
        return max(map(len, self.levels), default=1)

    def cache_rows(self, batch_size: int) -> int:
        """Cache rows that one prompt takes, where `batch_size` rows are read at a time."""
        return max(1, sum(min(batch_size, len(level)) for level in self.levels))

    @property
    def cost(self) -> int:
        """Number of tokens that are computed for one prompt besides the prompt."""
        return sum(map(len, self.levels[1:]))


class LabelTrees:
    """The trees of a task's records; records with the same labels share one. Raises UsageError for a task without."""

    def __init__(self, task: Task, processor: Processor):
        self._task, self._processor = task, processor
        self._trees: dict[tuple[str, ...], LabelTree] = {}
        if not any(slot.of for slot in task.slots.values()):
            require_labels(task, {})

    def of(self, record: Record) -> LabelTree:
        """The tree of a record. Raises UsageError as `require_labels` does."""
        labels = require_labels(self._task, record)
        if labels not in self._trees:
            if len(self._trees) == 256:
                self._trees.clear()
            self._trees[labels] = LabelTree(self._task, self._processor, labels)
        return self._trees[labels]


@torch.inference_mode()
def label_probabilities(
    model: M6, prompts: Items[Sequence], trees: Items[LabelTree], batch_size: int = 64
) -> list[dict[str, float]]:
    """For each prompt the probability of each label of its tree: the product, over the label's tokens and the end
    token, of the probability renormalized over the tokens that continue a label there.

    A prompt is read once; after it only prefixes that several labels share are read, `batch_size` at a time.
    """
    found: dict[int, dict[str, float]] = {}
    for tree in dict.fromkeys(trees):
        places = [i for i, own in enumerate(trees) if own is tree]
        for some in by_length([prompts[i] for i in places], max(1, batch_size // tree.width)):
            chosen = [places[i] for i in some]
            log_probs = _at_forks(model, [prompts[i] for i in chosen], tree, batch_size)
            certain = torch.zeros(len(chosen), dtype=torch.float64)
            columns = [
                sum((log_probs.get((path[:n], token), certain) for n, token in enumerate(path)), certain)
                for path in tree.paths.values()
            ]
            rows = torch.stack(columns, 1).exp().tolist()
            found |= {number: dict(zip(tree.paths, row, strict=True)) for number, row in zip(chosen, rows, strict=True)}
    return [found[i] for i in range(len(prompts))]


def _at_forks(
    model: M6, prompts: list[Sequence], tree: LabelTree, batch_size: int
) -> dict[tuple[Prefix, int], torch.Tensor]:
    """Log-probabilities fp64 [B] of every token that can follow a fork, by (fork, token)."""
    found: dict[tuple[Prefix, int], torch.Tensor] = {}
    if not tree.forks:
        return found
    count, longest, depth = len(prompts), max(map(len, prompts)), len(tree.levels)
    check_room(model, longest, depth)
    device = model.embed.weight.device
    below: dict[Prefix, list[Prefix]] = {}
    for prefix in (one for level in tree.levels[1:] for one in level):
        below.setdefault(prefix[:-1], []).append(prefix)

    def read(hidden: torch.Tensor, cache: KVCache, prefixes: list[Prefix]) -> None:
        """Row b * len(prefixes) + n of the cache holds prompt b followed by prefix n."""
        hidden_BND = hidden.view(count, len(prefixes), -1)
        for number, prefix in enumerate(prefixes):
            if tokens := tree.forks.get(prefix):
                log_probs = model.logits(hidden_BND[:, number])[:, tokens].double().log_softmax(-1).cpu()
                found.update({(prefix, token): log_probs[:, n] for n, token in enumerate(tokens)})
        longer = [(number, child) for number, prefix in enumerate(prefixes) for child in below.get(prefix, ())]
        most = max(1, batch_size // count)
        for some in (longer[first : first + most] for first in range(0, len(longer), most)):
            part = copy(cache)
            parents = torch.tensor([number for number, _ in some], device=device)
            part.select((torch.arange(count, device=device)[:, None] * len(prefixes) + parents).flatten())
            last = torch.tensor([child[-1] for _, child in some], device=device)
            read(step(model, last.repeat(count), part), part, [child for _, child in some])

    read(*prefill(model, pad(prompts, pad_id=0, rounded=True).to(device), longest + depth), [()])
    return found


@torch.inference_mode()
def target_losses(
    model: M6, processor: Processor, task: Task, records: Items[Record], batch_size: int = BATCH_SIZE,
    truncate: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Negative log-probability of the outputs of each record given its inputs, fp64 [N], and their numbers of tokens,
    int64 [N]; of several references the first is measured. `truncate`: see tasks.encode.encode."""
    sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    for start in range(0, len(records), batch_size):
        some = records[start : start + batch_size]
        batch = pad(
            [encode_example(task, record, processor, truncate=truncate or "end") for record in some],
            processor.tokenizer.pad_id,
        )
        total, trained = model(batch.to(model.embed.weight.device)).by_example(len(some))
        sums.append(total.cpu())
        counts.append(trained.cpu())
    return torch.cat(sums), torch.cat(counts)


def _check(context: Context, task: Task, request: Request) -> None:
    require_labels(task, request.record)


def _kv_shape(context: Context, task: Task, item: Prepared) -> tuple[int, int]:
    tree = LabelTrees(task, context.processor).of(item.request.record)
    positions = len(item.prompt) + max(item.options.max_new_tokens, len(tree.levels))
    check_room(context.model, positions, 0)
    return tree.cache_rows(BATCH_SIZE), positions


def _steps(context: Context, task: Task, items: list[Prepared], batch_size: int) -> Steps[list[Any]]:
    """The generated labels, then the probabilities, which cost the label prefixes that are read."""
    generated = yield from text_steps(context, task, items, batch_size)
    every = LabelTrees(task, context.processor)
    trees = [every.of(item.request.record) for item in items]
    found = label_probabilities(context.model, [item.prompt for item in items], trees, batch_size)
    yield [tree.cost for tree in trees]
    return list(zip(generated, found, strict=True))


def _read(context: Context, task: Task, raw: Any) -> Answer:
    answer = read_text(context, task, raw[0])
    return Answer({"value": answer.value, "probabilities": raw[1]}, answer.finished)


LABEL_PROBABILITIES = Mode(
    "probabilities", "text", applies=lambda task, request: request.probabilities, options=text_options,
    steps=_steps, read=_read, check=_check, kv_shape=_kv_shape,
)  # fmt: skip
