"""Weights to start from, each process filling the part of the network that it holds: it never exists as a whole."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from openm6.model.files import stored_rows
from openm6.model.network import Network
from openm6.train.distributed import local, rows_of

BLOCK = 2**20
"""Numbers that are drawn together, about."""


@torch.no_grad()
def start_at_random(model: Network, seed: int) -> None:
    """As its `initial` says. Numbers depend on the seed, a parameter's name and their place in it alone, so that a
    network starts the same however it is laid over however many processes."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for parameter, mean, std in model.initial(module):
            name, here = names.pop(parameter), local(parameter)
            first, last = rows_of(parameter)
            if std:
                _draw(here, first, last, parameter.shape, f"{seed}/{name}", mean, std)
            else:
                here.fill_(mean)
    assert not names, f"nothing says how {next(iter(names.values()))} starts"
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


@torch.no_grad()
def start_from(model: Network, path: Path) -> None:
    """The weights of a model directory; of each tensor only the rows are read that this process holds."""
    with stored_rows(path) as read:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            first, last = rows_of(tensor)
            if last > first:
                local(tensor).copy_(read(name, first, last))


def _draw(here: Tensor, first: int, last: int, shape: torch.Size, key: str, mean: float, std: float) -> None:
    """Rows `first` to `last` of a tensor of normal numbers. They are drawn in blocks of rows, each from a seed of its
    own; of the outer blocks a part is dropped."""
    width = max(1, shape[1:].numel())
    rows = max(1, BLOCK // width)
    for block in range(first // rows, -(-last // rows)):
        digest = blake2b(f"{key}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        begin, end = block * rows, min((block + 1) * rows, shape[0])
        numbers = torch.empty(end - begin, *shape[1:]).normal_(mean, std, generator=generator)
        inside = slice(max(first, begin), min(last, end))
        here[inside.start - first : inside.stop - first] = numbers[inside.start - begin : inside.stop - begin]
