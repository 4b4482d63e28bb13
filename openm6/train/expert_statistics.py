"""Tokens per expert over a run, and the balance of the routers that follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openm6.core.extras import require
from openm6.core.files import lines_of
from openm6.model import M6
from openm6.model.codec import Codec
from openm6.model.experts import MixtureOfExperts, RouterStatistics
from openm6.train.distributed import Group


def balance_loss(statistics: list[RouterStatistics]) -> Tensor | float:
    """The sum of the auxiliary and z losses of all expert layers."""
    return torch.stack([layer.loss for layer in statistics]).sum() if statistics else 0.0


class ExpertStatistics:
    """Sums the router statistics of all expert layers over the micro-batches of a step and over the processes.

    Between steps it moves the routers' biases where `bias_update` is set (arXiv 2408.15664: by a fixed amount, down for
    experts above the mean, up for those below).
    """

    def __init__(self, model: M6 | Codec, group: Group):
        self.group = group
        used = [block.feed_forward for block in model.layers()] if isinstance(model, M6) else []  # a codec has none
        self.layers = [layer for layer in used if isinstance(layer, MixtureOfExperts)]  # a shared one several times
        for layer in self.layers:
            layer.sum_over_processes = group.sum
        self.bias_update = model.config.bias_update if isinstance(model, M6) else 0.0
        self.experts: int = model.config.num_experts if isinstance(model, M6) else 0
        self.device = group.device
        self.start_step()
        self.clear()

    def clear(self) -> None:
        """Start the logged statistics anew."""
        self.window = torch.zeros(len(self.layers), self.experts + 1, dtype=torch.int64, device=self.device)

    def start_step(self) -> None:
        self.step = torch.zeros(len(self.layers), self.experts + 1, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            layer.earlier_tokens = None

    def add(self, statistics: list[RouterStatistics], more: bool) -> None:
        """Add a micro-batch, after its backward pass (which reads `earlier_tokens` again when it recomputes). `more`:
        another micro-batch follows."""
        if not statistics:
            return
        added = torch.stack([torch.cat((layer.tokens_per_expert, layer.dropped[None])) for layer in statistics])
        self.step += added
        if more and self.layers[0].auxiliary_loss:
            total = self.group.sum(added[:, :-1].clone())
            for layer, counts in zip(self.layers, total, strict=True):
                layer.earlier_tokens = counts if layer.earlier_tokens is None else layer.earlier_tokens + counts

    @torch.no_grad()
    def finish_step(self) -> None:
        """Sum over the processes, and move the biases. Every process calls it."""
        if not self.layers:
            return
        self.step = self.group.sum(self.step)
        self.window += self.step
        if self.bias_update:
            for layer, counts in zip(self.layers, self.step[:, :-1].float(), strict=True):
                assert layer.router.bias is not None
                layer.router.bias += self.bias_update * (counts.mean() - counts).sign()

    def statistics(self) -> dict[str, Any]:
        """By layer, since `clear`: coefficient of variation of the tokens per expert (0: all equal), fraction of
        choices dropped, and tokens of each expert. Empty for a dense model."""
        if not self.layers:
            return {}
        counts, dropped = self.window[:, :-1].double(), self.window[:, -1].double()
        variation = counts.std(1, correction=0) / counts.mean(1).clamp(min=1)
        return {
            "load_variation": [round(v, 4) for v in variation.tolist()],
            "load_dropped": [round(v, 5) for v in (dropped / counts.sum(1).clamp(min=1)).tolist()],
            "load": self.window[:, :-1].tolist(),
        }


def plot_expert_statistics(log: Path, target: Path) -> None:
    """Plot a run's `experts.jsonl`: variation of each layer over the steps, and the last load of all experts."""
    require("monitor", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in lines_of(log.read_text("utf-8"))]
    steps = [line["step"] for line in lines]
    last = torch.tensor(lines[-1]["load"], dtype=torch.float64)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for layer in range(len(last)):
        colour = pyplot.get_cmap("viridis")(layer / max(1, len(last) - 1))
        variation = [line["load_variation"][layer] for line in lines]
        left.plot(steps, variation, color=colour, lw=1, label=f"layer {layer + 1}")
    left.set(xlabel="step", ylabel="coefficient of variation", title="Load variation (0: balanced)", ylim=(0, None))
    if len(last) <= 12:
        left.legend(fontsize=7)
    load = (last / last.mean(1, keepdim=True)).numpy()
    image = right.imshow(load, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    right.set(xlabel="expert", ylabel="expert layer", title=f"Tokens an expert / mean, at step {steps[-1]}")
    right.set_yticks(range(len(last)), [str(n + 1) for n in range(len(last))])
    figure.colorbar(image, ax=right)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
