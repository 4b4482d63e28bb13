"""Initial weights. Each process fills only its part of the network, which never exists as a whole."""

from __future__ import annotations

import math
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from openm6.model.adapters import adapter_start, base_name, rows_beneath
from openm6.model.files import stored_rows
from openm6.model.network import Network
from openm6.model.roles import Role, role_of
from openm6.train.distributed import local, rows_of

BLOCK = 2**20
"""Numbers that are drawn together, about."""


@torch.no_grad()
def start_at_random(model: Network, seed: int) -> None:
    """Fill a network by its `initial`. The numbers depend only on the seed, the parameter's name and the position in
    it, so that they are the same for any number of processes and any sharding."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for parameter, mean, std in model.initial(module):
            _fill(parameter, f"{seed}/{names.pop(parameter)}", mean, std)
    assert not names, f"nothing says how {next(iter(names.values()))} starts"
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


@torch.no_grad()
def start_from(model: Network, path: Path, seed: int) -> None:
    """Fill a network with the weights of a model directory; only this process's rows are read. The weights of an
    adapter start at random."""
    with stored_rows(path) as read:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            here, (first, last) = local(tensor), rows_of(tensor)
            stored = base_name(name)
            if beneath := rows_beneath(model, name):  # type: ignore[arg-type]
                matrix, ids = beneath
                for place, number in enumerate(ids[first:last]):
                    if (row := read(matrix, number, number + 1)) is not None:
                        here[place] = row[0]
            elif stored is None:
                start = adapter_start(role_of(model, name), tensor.shape, model.config.initializer_range)
                _fill(tensor, f"{seed}/{name}", *start)
            elif last > first and (rows := read(stored, first, last)) is not None:
                here.copy_(rows)
            elif last > first:  # a head that is new to the model
                assert role_of(model, name) is Role.HEAD, f"{path} does not hold {stored}"
                _fill(tensor, f"{seed}/{name}", 0.0, model.config.initializer_range if tensor.ndim > 1 else 0.0)


@torch.no_grad()
def start_codes(weight: Tensor, first: int, vectors_KE: Tensor, seed: int, std: float) -> None:
    """Let the rows of image codes, from row `first` of `weight` [V, D] on, start alike where their vectors in the codec
    are near: random Fourier features of a Gaussian kernel (Rahimi and Recht 2007), of deviation `std`.

    What is learned of one code so holds for those like it (the demo's model was 100 to 150 steps ahead after 400).
    """
    generator = torch.Generator().manual_seed(seed)
    vectors_KE = (vectors_KE - vectors_KE.mean(0)) / vectors_KE.std(0)
    frequencies_ED = torch.randn(vectors_KE.shape[1], weight.shape[1], generator=generator)
    phases_D = 2 * math.pi * torch.rand(weight.shape[1], generator=generator)
    rows_KD = math.sqrt(2) * std * torch.cos(vectors_KE @ frequencies_ED + phases_D)
    begin, end = rows_of(weight)
    inside = range(max(begin, first), min(end, first + len(rows_KD)))
    if inside:
        local(weight)[inside.start - begin : inside.stop - begin] = rows_KD[inside.start - first : inside.stop - first]


def _fill(tensor: Tensor, key: str, mean: float, std: float) -> None:
    """Fill this process's rows of a tensor with normal numbers, or with the mean."""
    if std:
        _draw(local(tensor), *rows_of(tensor), tensor.shape, key, mean, std)
    else:
        local(tensor).fill_(mean)


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
