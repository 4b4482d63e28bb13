"""Checkpoints of a training run: complete or absent, and independent of the number of processes.

    checkpoints/step-00000500/
        state/        tensors of network and optimizers by name, in shards (PyTorch's distributed checkpoint)
        config.json, tokenizer.json, openm6.json   as in a model directory
        recipe.yaml   the recipe, here and in the model directory
        state.json    step, place in the data, counters, hashes of what it learns from (resume.py)

Each is written to a temporary folder while training continues, flushed to the disk and renamed; a crash or a full disk
leaves the older checkpoints intact. M processes can read what N wrote: tensors are found by name and resharded.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from openm6.core.errors import OpenM6Error
from openm6.core.files import publish, write_failed, write_whole
from openm6.model import adapters
from openm6.model.files import layer_of, shared_name, write_shards
from openm6.train.distributed import Group, is_sharded, local
from openm6.train.optimizer import set_rate, step_all

# One process is one process; said from several threads, so no context can hold it back.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def all_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, from the oldest to the newest."""
    return sorted(p for p in directory.glob("step-*") if (p / "state.json").is_file())


def latest_checkpoint(directory: Path) -> Path | None:
    return next(reversed(all_checkpoints(directory)), None)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The state that `Checkpoints.save` was given. Raises OpenM6Error for a checkpoint that is damaged."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        raise _damaged(checkpoint) from None


class Checkpoints:
    """The checkpoints of one run: `save`, `wait`, `latest`, `restore`. Every process calls all but `latest`."""

    def __init__(self, directory: Path, keep: int, group: Group):
        self.directory, self.keep, self.group = directory, keep, group
        self.best: int | None = None  # the step of a checkpoint that stays
        # A separate group: the writing thread communicates while the training does.
        self.channel = dist.new_group(backend="gloo") if group.world > 1 else None
        self.writing: Thread | None = None
        self.failure: BaseException | None = None

    def latest(self) -> Path | None:
        return latest_checkpoint(self.directory)

    def save(
        self, step: int, describe: Callable[[Path], None], model: nn.Module, optimizers: list[Optimizer],
        state: dict[str, Any],
    ) -> None:  # fmt: skip
        """Start writing the current values in the background. `state` is any JSON value, `describe` writes all files of
        a model directory except the weights. Raises the error of the previous write, if it failed."""
        self.wait()
        target = self.directory / step_name(step)
        draft = target.with_name(f".{target.name}.writing")
        content = {**state, "step": step, "optimizers": _names(optimizers)}
        if self.group.first:
            shutil.rmtree(draft, ignore_errors=True)
            try:
                describe(draft)
                (draft / "state.json").write_text(json.dumps(content), "utf-8")
            except OSError as error:
                raise write_failed(target, error) from None
        self.group.wait()
        import torch.distributed.checkpoint as dcp  # takes half as long as PyTorch

        tensors = {**_named(model, optimizers), f"random.{self.group.rank}": torch.get_rng_state()}
        writer = dcp.FileSystemWriter(draft / "state", sync_files=True)
        alone = self.group.world == 1
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self.channel, no_dist=alone)
        best = self.best

        def finish() -> None:
            try:
                future.result()  # type: ignore[union-attr]  # done when all processes are
                if self.group.first:
                    publish(draft, target)
                    for old in all_checkpoints(self.directory)[: -self.keep]:
                        if step_of(old) != best:
                            shutil.rmtree(old, ignore_errors=True)
            except BaseException as error:
                self.failure = write_failed(target, error)
                shutil.rmtree(draft, ignore_errors=True)

        self.writing = Thread(target=finish)
        self.writing.start()

    def wait(self) -> None:
        """Wait until the checkpoint being written is on the disk."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def restore(
        self,
        path: Path,
        model: nn.Module,
        optimizers: list[Optimizer],
        update: Callable[[list[Optimizer]], None] = step_all,
        shared: int | None = None,
        moments: str = "copy",
    ) -> dict[str, Any]:
        """Load weights, optimizers and random numbers in place; returns the state that `save` was given. `update` makes
        a step of the optimizers (Parallel.update).

        `shared`: the checkpoint is of a network with so few distinct layers, and layer i of this one takes layer
        i mod shared, its optimizer moments by `moments` (PseudoSection).
        """
        state = state_of(path)
        stored = _stored(path)
        made = state.pop("optimizers", None)
        _compare(path, {_source(n, shared): t for n, t in _named(model, []).items()}, stored)
        if made != _names(optimizers):
            raise OpenM6Error(
                f"The checkpoint {path} was not made with this recipe's train.optimizer "
                f"({', '.join(_names(optimizers))}): choose another output directory, or set it back."
            )
        _prepare(model, optimizers, update)
        if shared and moments == "reset":
            for parameter, name, optimizer in _owned(model, optimizers):
                if layer_of(name) is not None:
                    optimizer.state.pop(parameter)
        tensors = _named(model, optimizers)
        random, key = torch.get_rng_state(), f"random.{self.group.rank}"
        if key in stored:
            tensors[key] = random
        # One stored tensor can have several copies: each reading gives every name once.
        readings: list[dict[str, Tensor]] = []
        for name, tensor in tensors.items():
            source = _source(name, shared)
            reading = next((r for r in readings if source not in r), None)
            if reading is None:
                readings.append(reading := {})
            reading[source] = tensor
        for reading in readings:
            _read(path, reading, self.group.world == 1)
        if shared and moments == "rescale":
            _rescale(tensors, len({layer_of(n) for n in tensors if layer_of(n) is not None}) / shared)
        for parameter, name, optimizer in _owned(model, optimizers):
            for moment, value in optimizer.state[parameter].items():
                if is_traceable_wrapper_subclass(local(value)):
                    local(value).copy_(local(tensors[f"optimizer.{moment}.{name}"]))
        torch.set_rng_state(random)
        return state


def consolidate(checkpoint: Path, target: Path) -> None:
    """The network of a checkpoint, however many processes wrote it, as one model directory in safetensors; at no time
    more than a file of it is in memory."""
    stored = {n.removeprefix("model."): shape for n, shape in _stored(checkpoint).items() if n.startswith("model.")}

    def fill(draft: Path) -> None:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != "state.json":
                shutil.copy(file, draft / file.name)
            elif file.is_dir() and file.name != "state":
                shutil.copytree(file, draft / file.name)
        if (checkpoint / adapters.CONFIG).is_file():  # PEFT keeps an adapter in one file, under names of its own
            tensors = {f"model.{key}": torch.empty(shape) for key, shape in stored.items()}
            _read(checkpoint, tensors, alone=True)
            named = {adapters.stored_name(key.removeprefix("model.")): value for key, value in tensors.items()}
            save_file(named, draft / adapters.WEIGHTS, metadata={"format": "pt"})
            return
        without_data = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
        write_shards(draft, without_data, write)

    def write(file: Path, part: dict[str, Tensor]) -> None:
        tensors = {key: torch.empty(like.shape) for key, like in part.items()}
        _read(checkpoint, {f"model.{key}": tensor for key, tensor in tensors.items()}, alone=True)
        save_file(tensors, file, metadata={"format": "pt"})

    write_whole(target, fill)


def _names(optimizers: list[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _damaged(path: Path) -> OpenM6Error:
    return OpenM6Error(f"The checkpoint {path} is damaged; delete it to resume from the one before.")


def _stored(path: Path) -> dict[str, torch.Size]:
    """Name and whole size of every tensor of a checkpoint. Raises OpenM6Error for a damaged one."""
    import torch.distributed.checkpoint as dcp

    try:
        metadata = dcp.FileSystemReader(path / "state").read_metadata()
        return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
    except Exception:
        raise _damaged(path) from None


def _read(path: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    """Fill tensors by their names. Raises OpenM6Error for a damaged checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / "state"), no_dist=alone)
    except (Exception, CheckpointException):
        raise _damaged(path) from None


def _named(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """`model.{name}` and `optimizer.{moment}.{parameter}` to tensor (sharded ones as DTensors), of an adapted network
    the adapter alone. Learning rates come from the schedule, not from here."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = not getattr(model, "adapted", False)
    tensors = {f"model.{n}": value.detach() for n, value in model.state_dict().items() if whole or n in trained}
    for parameter, name, optimizer in _owned(model, optimizers):
        for moment, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = _plain(value)
    return tensors


def _plain(moment: Tensor) -> Tensor:
    """A moment itself; of one that is kept in 8 bits a copy in fp32, which can be cut anywhere."""
    here = local(moment)
    if not is_traceable_wrapper_subclass(here):
        return moment
    here = here.dequantize()
    if not is_sharded(moment):
        return here
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        here, moment.device_mesh, moment.placements, run_check=False, shape=moment.shape, stride=moment.stride()
    )


def _owned(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[tuple[nn.Parameter, str, Optimizer]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, names[parameter], optimizer


def _source(name: str, shared: int | None) -> str:
    """The name of tensor `name` in a checkpoint with `shared` distinct layers."""
    return shared_name(name, shared) if shared else name


@torch.no_grad()
def _prepare(model: nn.Module, optimizers: list[Optimizer], update: Callable[[list[Optimizer]], None]) -> None:
    """Let new optimizers create their moments, in whatever form and place: a step at rate 0 with zero gradients, layer
    by layer."""
    rates = [(group, float(group["lr"])) for optimizer in optimizers for group in optimizer.param_groups]
    for group, _ in rates:
        set_rate(group, 0.0)
    layers: dict[int | None, list[nn.Parameter]] = {}
    for parameter, name, _ in _owned(model, optimizers):
        layers.setdefault(layer_of(name), []).append(parameter)
    for layer in layers.values():
        for parameter in layer:
            parameter.grad = torch.zeros_like(parameter)
        update(optimizers)
    for group, rate in rates:
        set_rate(group, rate)


_POWERS = {"exp_avg": 1, "momentum": 1, "exp_avg_sq": 2, "row_var": 2, "col_var": 2, "variance": 2}
"""Power of the gradient's scale by which each moment scales."""


def _rescale(tensors: dict[str, Tensor], layers: float) -> None:
    """The gradient of a shared layer was the sum of those of its `layers` layers."""
    for name, tensor in tensors.items():
        if name.startswith("optimizer.") and layer_of(name) is not None:
            tensor /= layers ** _POWERS.get(name.split(".", 2)[1], 0)


def _compare(path: Path, wanted: dict[str, Tensor], stored: dict[str, torch.Size]) -> None:
    found = {name: size for name, size in stored.items() if name.startswith("model.")}
    for name in sorted(wanted.keys() | found.keys()):
        here, there = wanted[name].shape if name in wanted else None, found.get(name)
        if here != there:
            told = [f"is {list(size)}" if size is not None else "is missing" for size in (there, here)]
            raise OpenM6Error(
                f"The checkpoint {path} does not fit this recipe's model: {name.removeprefix('model.')} {told[0]} "
                f"there and {told[1]} here. Choose another output directory, or set the sizes back."
            )
