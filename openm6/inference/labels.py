"""The probability of each label of a closed set, the set being all that may be written."""

from __future__ import annotations

from collections.abc import Sequence as Items
from copy import copy
from itertools import groupby

import torch

from openm6.core.batch import by_length, pad
from openm6.core.errors import UsageError
from openm6.core.sequence import Sequence
from openm6.inference.decoding import check_room
from openm6.model import M6
from openm6.model.cache import KVCache, prefill, step
from openm6.tasks import target
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

Prefix = tuple[int, ...]


def closed_labels(task: Task) -> tuple[str, ...]:
    """The labels of a task whose one output is a label of a closed set; of another task none."""
    return task.labels.get(task.outputs[0], ()) if len(task.outputs) == 1 else ()


class LabelTree:
    """The tokens of a task's labels, each with the end token, as a tree.

    paths    the tokens of each label
    forks    the prefixes after which the labels leave a choice, and the tokens to choose from
    levels   the prefixes that the network has to read to come to the forks, by their length from 0 on
    """

    def __init__(self, task: Task, processor: Processor):
        labels = closed_labels(task)
        if not labels:
            raise UsageError(f"The task {task.name} has no probabilities: its one output has to be a label of a set.")
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
        """Rows that one prompt takes at most."""
        return max(map(len, self.levels), default=1)

    def cached(self, most: int) -> int:
        """Rows of all caches that one prompt takes, where `most` rows are read at a time."""
        return max(1, sum(min(most, len(level)) for level in self.levels))


@torch.inference_mode()
def label_probabilities(
    model: M6, prompts: Items[Sequence], tree: LabelTree, batch_size: int = 64
) -> list[dict[str, float]]:
    """For each prompt the probability of each label: the product, over the label's tokens and the end, of the
    probability renormalized over the tokens that the labels allow there.

    A prompt is read once; after that only beginnings that several labels have in common are read, `batch_size` at a
    time.
    """
    found: dict[int, dict[str, float]] = {}
    for chosen in by_length(prompts, max(1, batch_size // tree.width)):
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
    """The log-probabilities fp64 [B] of every token that may follow a fork."""
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
        """Row b * len(prefixes) + n of the cache holds prompt b with the n-th of these prefixes."""
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

    read(*prefill(model, pad(prompts, pad_id=0, even=True).to(device), longest + depth), [()])
    return found
