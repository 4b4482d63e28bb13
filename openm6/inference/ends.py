"""Answers that are not generated: the network's output at the end of a prompt, as a vector or through a head."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from openm6.core.batch import Batch, pad
from openm6.core.errors import UsageError
from openm6.inference.request import Answer, Context, Mode, Prepared, Request
from openm6.inference.steps import Steps, in_batches
from openm6.model import M6
from openm6.tasks.heads import HEADS
from openm6.tasks.task import Task


def check_dims(model: M6, dims: Any) -> int | None:
    """The number of dimensions to which vectors are cut; None: they are not. Raises UsageError where the model's
    vectors do not have so many."""
    if dims is None:
        return None
    is_number = isinstance(dims, Real)
    if not is_number or not 1 <= dims <= model.config.hidden_size or dims != dims // 1:
        raise UsageError(
            f"dims is {dims}; vectors of this model have 1 to {model.config.hidden_size} numbers.", param="dims"
        )
    return int(dims)


def _each_batch(
    context: Context, items: list[Prepared], batch_size: int, results: Callable[[Batch], list[Any]]
) -> Steps[list[Any]]:
    """A step is a pass over a batch of prompts; it generates nothing, so that the prompts are its only cost."""

    @torch.inference_mode()
    def batch_steps(chosen: list[int]) -> Steps[list[Any]]:
        batch = pad([items[i].prompt for i in chosen], context.processor.tokenizer.pad_id, even=True)
        found = results(batch.to(context.model.embed.weight.device))
        yield [0] * len(chosen)
        return found

    return in_batches([item.prompt for item in items], batch_size, batch_steps)


def _vector_steps(context: Context, task: Task, items: list[Prepared], batch_size: int) -> Steps[list[Any]]:
    """The first `dims` numbers of the state at each prompt's end, normalized: fp32 [dims] each."""

    def vectors(batch: Batch) -> list[Any]:
        hidden = context.model(batch).hidden
        ends = hidden.flatten(0, 1)[batch.ends().to(hidden.device)].float().cpu()
        return list(torch.nn.functional.normalize(ends[:, : items[0].options], dim=-1).numpy())

    return _each_batch(context, items, batch_size, vectors)


def _head_steps(context: Context, task: Task, items: list[Prepared], batch_size: int) -> Steps[list[Any]]:
    """The outputs of the task's head for each prompt, a list of numbers each."""
    return _each_batch(context, items, batch_size, lambda batch: context.model(batch).heads[task.head].tolist())


def _check_head(context: Context, task: Task, request: Request) -> None:
    if task.head not in context.model.heads:
        raise UsageError(f"This model has no head {task.head}: it was not trained for a task that it answers.")


VECTOR = Mode(
    "vector", "vector", applies=lambda task, request: task.embeds,
    options=lambda context, task, request: check_dims(context.model, request.decoding.get("dims")),
    steps=_vector_steps, read=lambda context, task, vector: Answer(vector),
)  # fmt: skip
HEAD = Mode(
    "head", "value", applies=lambda task, request: bool(task.head), options=lambda context, task, request: None,
    steps=_head_steps, read=lambda context, task, outputs: Answer(HEADS[task.head].read(outputs)), check=_check_head,
    available=lambda context, task: task.head in context.model.heads,
)  # fmt: skip
