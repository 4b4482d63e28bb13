"""Expert parallelism: each routed row is sent to the process of its expert, and the output is sent back.

All-to-all with uneven splits, dispatched before the shared expert's work and awaited after it, in the backward pass
too: the transfer of the rows' gradients starts before the shared expert's backward pass and is awaited after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from openm6.model.experts import GatherRows

Products = Callable[[Tensor, Tensor], Tensor]
"""(rows in the order of their experts, rows of each) to the experts' outputs."""


@dataclass(slots=True)
class Ticket:
    """Rows in transfer: the sizes sent and received, and the pending transfer."""

    sent: list[int]
    received: list[int]
    counts: Tensor
    total: int
    rows: Tensor
    flight: _Flight


@dataclass(slots=True)
class _Flight:
    """A transfer between its start and its end; forward first, then the gradient's."""

    group: Any
    rows: Tensor | None = None
    work: Any = None

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        self.rows = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            self.rows, rows.contiguous(), received, sent, group=self.group, async_op=True
        )
        return self.rows

    def wait(self) -> Tensor:
        rows, work = self.rows, self.work
        self.rows = self.work = None
        work.wait()
        return rows  # type: ignore[return-value]


class AllToAll:
    """The exchange of an expert layer over `group`, whose rank r holds experts r N/P to (r + 1) N/P of N, P its size.

    `rows_sent` counts the rows that left this process, `rows_received` those that its experts worked on.
    """

    def __init__(self, group: Any):
        self.group, self.size = group, dist.get_world_size(group)
        self.rows_sent = self.rows_received = 0

    def send(self, rows_SD: Tensor, counts_N: Tensor) -> Ticket:
        """Start sending rows, ordered by expert with counts_N for each; rows beyond their sum are not sent."""
        counts_PL = counts_N.view(self.size, -1)
        arriving_PL = torch.empty_like(counts_PL)
        dist.all_to_all_single(arriving_PL, counts_PL.contiguous(), group=self.group)
        sent, received = torch.stack((counts_PL.sum(1), arriving_PL.sum(1))).tolist()
        flight = _Flight(self.group)
        total = sum(sent)
        self.rows_sent += total - sent[dist.get_rank(self.group)]
        self.rows_received += sum(received)
        rows = _Start.apply(rows_SD[:total], sent, received, flight)
        return Ticket(sent, received, arriving_PL, len(rows_SD), rows, flight)

    def receive(self, ticket: Ticket, products: Products) -> Tensor:
        """Await the rows, apply this process's experts, and return the outputs: [S, D], zero for rows not sent."""
        rows = _Wait.apply(ticket.rows, ticket.received, ticket.sent, ticket.flight)
        # They come by process, each in the order of the experts: put each expert's together.
        local = ticket.counts.shape[1]
        expert = torch.arange(local, device=rows.device).repeat(self.size)
        order = expert.repeat_interleave(ticket.counts.flatten(), output_size=len(rows)).argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        y = products(GatherRows.apply(rows, order, back[None]), ticket.counts.sum(0))
        y = GatherRows.apply(y, back, order[None])
        flight = _Flight(self.group)
        y = _Start.apply(y, ticket.received, ticket.sent, flight)
        y = _Wait.apply(y, ticket.sent, ticket.received, flight)
        return F.pad(y, (0, 0, 0, ticket.total - len(y)))


class _Start(torch.autograd.Function):
    """Begin a transfer; its result must not be touched before `_Wait`. Backward awaits the gradient's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.flight.wait(), None, None, None


class _Wait(torch.autograd.Function):
    """Await a transfer. Backward begins the gradient's, the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], flight: _Flight) -> Tensor:
        flight.wait()
        ctx.flight, ctx.received, ctx.sent = flight, received, sent
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.flight.start(d_rows, ctx.received, ctx.sent)
        return d_rows, None, None, None  # of the expected shape; `_Start` takes what arrives
