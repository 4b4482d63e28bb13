"""Sparse experts in the place of a feed-forward: routers, dispatch, grouped products (M6-T, arXiv 2105.15082).

Legend, beside that of attention.py: N experts, K experts a token, T tokens (all positions of a batch), S = K T choices
(of a token for an expert), F width of an expert.

    x [T, D] -> Router: K experts and weights a token -> plan: choices in the order of their experts
             -> gather [S, D] -> products of each expert with its rows -> combine: weighted sum, [T, D]

A choice that no expert takes (above capacity, or of padding) counts as one for expert N: it is last and its output is
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model import cpu
from openm6.model.config import ModelConfig
from openm6.model.cpu.experts import ExpertLoop
from openm6.model.cpu.packed import PackedLinear
from openm6.model.feed_forward import FeedForward, activate
from openm6.model.precision import product_dtype
from openm6.model.roles import Role
from openm6.model.routers import ROUTERS


class Routing(NamedTuple):
    """The decision of a router: experts int64 [T, K], their weights [T, K], all scores [T, N] (softmax over all experts
    or in each group); where the z-loss is asked for, the logsumexp of the logits [T, softmaxes]. All at least fp32."""

    experts_TK: Tensor
    weights_TK: Tensor
    scores_TN: Tensor
    norms: Tensor | None


class RouterStatistics(NamedTuple):
    """Statistics of one forward pass through an expert layer.

    tokens_per_expert  int64 [N], choices of each expert by real positions, before capacity
    dropped            int64 [], choices above capacity
    loss               [], auxiliary and z losses, summed over the real positions (to be divided by their number in the
                       whole step)
    """

    tokens_per_expert: Tensor
    dropped: Tensor
    loss: Tensor


class Router(nn.Module):
    """K experts a token by one weight matrix [N, D]: the K largest, or the best of each of K groups of N/K experts
    (routers.py).

    `bias` [N] moves the choice, never the weights: balance without a loss (Wang et al. 2024, arXiv 2408.15664).
    """

    bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.chosen = ROUTERS[config.router], config.experts_per_token
        self.softmaxes = config.experts_per_token if self.kind.softmax_per_group else 1
        self.normalize, self.with_norms = config.normalize_expert_weights, config.router_z_loss > 0
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts) if config.bias_update else None)

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TN = _Logits.apply(x_TD, self.weight)
        logits = logits_TN.unflatten(1, (self.softmaxes, -1))
        scores_TN = logits.softmax(-1).flatten(1)
        wanted_TN = scores_TN.detach() if self.bias is None else scores_TN.detach() + self.bias
        experts_TK = self.kind.choose(wanted_TN, self.chosen)
        weights_TK = scores_TN.gather(1, experts_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(experts_TK, weights_TK, scores_TN, logits.logsumexp(-1) if self.with_norms else None)


class _Logits(torch.autograd.Function):
    """x W^T in at least fp32, for a rounded score can choose another expert; its gradients in the precision of x."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        if cpu.takes(x_TD) and dtype == torch.float32:  # oneDNN takes a third of the time for so few columns
            return PackedLinear(weight, None, dtype)(x_TD)
        return F.linear(x_TD.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, d_logits_TN: Tensor) -> tuple[Tensor | None, Tensor]:
        x_TD, weight = ctx.saved_tensors
        d_logits_TN = d_logits_TN.to(x_TD.dtype)
        d_x = d_logits_TN @ weight.to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        return d_x, (d_logits_TN.T @ x_TD).to(weight.dtype)


class Plan(NamedTuple):
    """Choices in the order of their experts: `order` int64 [S] (choice j T + t is the j-th of token t), where each
    stands in that order, `place` int64 [K, T], how many rows each expert gets, `counts` int64 [N], and how many it
    would get without a capacity, `wanted` int64 [N]."""

    order: Tensor
    place: Tensor
    counts: Tensor
    wanted: Tensor


def plan(experts_TK: Tensor, experts: int, capacity_factor: float | None = None) -> Plan:
    """Sort the choices by expert (`experts` itself stands for none). An expert takes at most `capacity_factor` times
    the mean over the experts, rounded up: first choices go before second ones, and among those the order of the tokens
    counts (GShard, algorithm 1)."""
    choices = experts_TK.T.flatten()
    order = choices.argsort(stable=True)
    counts = wanted = torch.bincount(choices, minlength=experts + 1)[:experts]
    if capacity_factor is not None:
        capacity = (capacity_factor * counts.sum().double() / experts).ceil().long()
        if bool((counts > capacity).any()):
            sorted_choices = choices[order]
            starts = F.pad(counts.cumsum(0), (1, 0))
            late = torch.arange(len(order), device=order.device) - starts[sorted_choices] >= capacity
            choices = choices.index_fill(0, order[late], experts)
            order = choices.argsort(stable=True)
            counts = counts.clamp(max=capacity)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Plan(order, place.view(experts_TK.shape[1], -1), counts, wanted)


class MixtureOfExperts(nn.Module):
    """`num_experts` feed-forwards without biases, of which each token sees `experts_per_token`, and optionally a shared
    one that all see.

    Capacity: in training an expert takes at most ceil(capacity_factor K T / N) rows, T without padding; what is above
    passes by the residual. In use nothing is dropped: an answer must not depend on its neighbors in the batch.
    """

    roles: ClassVar[dict[str, Role]] = {"router": Role.ROUTER, "experts": Role.EXPERT}

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.number, self.capacity_factor = config.num_experts, config.capacity_factor
        self.auxiliary_loss, self.router_z_loss = config.auxiliary_loss, config.router_z_loss
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = FeedForward(config, config.shared_intermediate_size) if config.shared_intermediate_size else None
        # Set by train/: tokens per expert of the step's earlier micro-batches, the sum over the processes, and the
        # exchange of rows with experts of other processes (train/expert_parallel.py).
        self.earlier_tokens: Tensor | None = None
        self.sum_over_processes: Callable[[Tensor], Tensor] = lambda counts: counts
        self.exchange: Any = None

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, RouterStatistics]:
        """The sum of the chosen experts' outputs, weighted, and the statistics. `real_BT` is False at padding."""
        x_TD = x_BTD.flatten(0, -2).to(product_dtype(x_BTD))
        routing = self.router(x_TD)
        chosen_TK = routing.experts_TK
        if real_BT is not None:
            chosen_TK = chosen_TK.masked_fill(~real_BT.flatten()[:, None], self.number)
        planned = plan(chosen_TK, self.number, self.capacity_factor if self.training else None)
        rows_SD = GatherRows.apply(x_TD, planned.order % len(x_TD), planned.place)
        ticket = self.exchange and self.exchange.send(rows_SD, planned.counts)
        shared_TD = self.shared(x_TD) if self.shared is not None else None  # while the rows travel
        y_SD = self.exchange.receive(ticket, self.experts) if ticket else self.experts(rows_SD, planned.counts)
        y_TD = _Combine.apply(y_SD, routing.weights_TK, planned)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BTD), self._statistics(routing, planned, real_BT)

    def _statistics(self, routing: Routing, planned: Plan, real_BT: Tensor | None) -> RouterStatistics:
        counts = planned.wanted
        loss = routing.weights_TK.new_zeros(())
        if self.training and (self.auxiliary_loss or self.router_z_loss):
            scores_TN = routing.scores_TN
            real = scores_TN.new_ones(len(scores_TN)) if real_BT is None else real_BT.flatten().to(scores_TN.dtype)
            if self.auxiliary_loss:
                # Over the whole batch of the step: balance inside each micro-batch keeps experts from specializing
                # (arXiv 2501.11873).
                seen = self.sum_over_processes(counts.to(loss.dtype))
                seen = seen if self.earlier_tokens is None else seen + self.earlier_tokens
                share_N = seen / seen.sum().clamp(min=1)
                width = self.number / self.router.softmaxes
                loss = loss + self.auxiliary_loss * width * ((real @ scores_TN) @ share_N)
            if routing.norms is not None:
                loss = loss + self.router_z_loss * (real @ routing.norms.square().mean(1))
        return RouterStatistics(counts, counts.sum() - planned.counts.sum(), loss)


class GatherRows(torch.autograd.Function):
    """x [T, D] to its rows `order`, int64 [S]; token t stands at `place`[:, t], int64 [K, T], in the result: backward
    sums these rows, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x_TD.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, d_rows_SD: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        total = d_rows_SD.index_select(0, place[0])
        for where in place[1:]:
            total += d_rows_SD.index_select(0, where)
        return total, None, None


class _Combine(torch.autograd.Function):
    """sum over j of weights[t, j] y[place[j, t]], in the precision of the weights."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, weights_TK: Tensor, planned: Plan) -> Tensor:
        ctx.save_for_backward(y_SD, weights_TK, planned.place)
        total = y_SD.index_select(0, planned.place[0]) * weights_TK[:, :1]
        for where, weight in zip(planned.place[1:], weights_TK[:, 1:].unbind(1), strict=True):
            total.addcmul_(y_SD.index_select(0, where).to(total.dtype), weight[:, None])
        return total

    @staticmethod
    def backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_SD, weights_TK, place = ctx.saved_tensors
        d_y_SD, d_weights_TK = torch.empty_like(y_SD), torch.empty_like(weights_TK)
        for j, where in enumerate(place):
            d_y_SD.index_copy_(0, where, (d_out_TD * weights_TK[:, j, None]).to(y_SD.dtype))
            d_weights_TK[:, j] = torch.linalg.vecdot(d_out_TD, y_SD.index_select(0, where).to(d_out_TD.dtype))
        return d_y_SD, d_weights_TK, None


class Experts(nn.Module):
    """The weights of N feed-forwards, `up` [N, F or 2F, D] and `down` [N, D, F]; spread over processes, DTensors."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        number, width = config.num_experts, config.expert_intermediate_size
        self.gated = config.activation == "swiglu"
        self.up = nn.Parameter(torch.empty(number, width * (2 if self.gated else 1), config.hidden_size))
        self.down = nn.Parameter(torch.empty(number, config.hidden_size, width))

    def forward(self, rows_SD: Tensor, counts: Tensor) -> Tensor:
        """down[n] activation(up[n] x) for each row x, [S, D]: the first counts[0] rows meet expert 0, and so on; rows
        beyond their sum give zero."""
        up, down = (w.to_local() if hasattr(w, "to_local") else w for w in (self.up, self.down))
        if cpu.takes(rows_SD):
            return ExpertLoop.apply(rows_SD, up, down, counts.tolist(), self.gated)
        ends = counts.cumsum(0, dtype=torch.int32)
        # What grouped_mm leaves in the rows beyond is not defined, neither here nor in its gradient.
        taken = torch.arange(len(rows_SD), device=rows_SD.device)[:, None] < ends[-1]
        rows_SD = torch.where(taken, rows_SD, 0)
        dtype = rows_SD.dtype
        inner = F.grouped_mm(rows_SD, up.to(dtype).transpose(1, 2), offs=ends)
        y_SD = F.grouped_mm(activate(inner, self.gated), down.to(dtype).transpose(1, 2), offs=ends)
        return torch.where(taken, y_SD, 0)
