"""M6-10T (arXiv 2110.03888): shared layers first, their own later; against training from scratch and depth stacking.

The paper reaches the loss of the baseline with 40% of its samples, where memory is what binds. Sharing costs the FLOPs
of the full depth from the first step; stacking (G_stack, arXiv 2405.15319) begins with a shallow network and does not.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from reproduce.common import Finding, Run, Scale, Variant, compare, train_all, write_page

TITLE = "Pseudo-to-Real: share, then delink"
INTRO = (
    "A network of experts (16, top-1). From scratch; with all layers shared for the first 40% or 70% of the steps; "
    "with the moments of the optimizer copied or begun anew instead of rescaled; and stacked: half the layers for the "
    "first 40%, then the stack twice. How soon: the share of the steps, and of the FLOPs, after which the training "
    "loss is that of the end of the run from scratch."
)

REMARK = (
    "Sharing runs the full depth from the first step: a step costs what it costs from scratch, and what is saved are "
    "the states of all layers but one (`openm6 bench sharing`). So it can pay only where memory binds and the whole "
    "network would not fit, as in the paper; stacking saves both while it is shallow."
)


def run(scale: Scale, folder: Path, out: Path) -> Path:
    sizes = {"num_experts": 16, "experts_per_token": 1}
    early, late = round(0.4 * scale.steps), round(0.7 * scale.steps)
    warm = max(1, scale.steps // 40)
    schedule = {"schedule": "wsd"}

    def pseudo(name: str, steps: int, moments: str = "rescale") -> Variant:
        return Variant(name, sizes, schedule, {"layers": 1, "steps": steps, "moments": moments, "rewarm": warm})

    runs = train_all(
        "pseudo-to-real",
        [
            Variant("from scratch", sizes, schedule),
            pseudo("shared for 40%", early),
            pseudo("shared for 70%", late),
            pseudo("shared for 40%, moments copied", early, "copy"),
            pseudo("shared for 40%, moments reset", early, "reset"),
            Variant("shared to the end", {**sizes, "distinct_layers": 1}, schedule),
            Variant("stacked", sizes, schedule, grown_from=(scale.sizes["num_hidden_layers"] // 2, early)),
        ],
        scale,
        folder,
    )
    scratch = runs["from scratch"]
    found = [
        compare(
            "Shared for 40%, then delinked, beats training from scratch at equal steps", runs["shared for 40%"], scratch
        ),
        compare(
            "Delinking is worth it: shared for 40% beats shared to the end",
            runs["shared for 40%"],
            runs["shared to the end"],
        ),
        compare("Rescaled moments beat copied ones", runs["shared for 40%"], runs["shared for 40%, moments copied"]),
        compare("Rescaled moments beat none", runs["shared for 40%"], runs["shared for 40%, moments reset"]),
        *(_reached(name, runs[name], scratch) for name in ("shared for 40%", "shared for 70%", "stacked")),
        *(_lighter(name, runs[name], scratch, early) for name in ("shared for 40%", "stacked")),
    ]
    return write_page("pseudo_to_real", TITLE, INTRO, scale, runs, found, out, REMARK)


def _lighter(name: str, runs: list[Run], scratch: list[Run], steps: int) -> Finding:
    """The memory of a first stage of so many steps."""
    until = [[m for (step, _), m in zip(run.curve, run.memory, strict=True) if step <= steps] for run in runs]
    a, b = (median(memory[-1] for memory in group) / 2**20 for group in (until, [run.memory for run in scratch]))
    verdict = "holds" if a < b else "does not hold"
    return Finding(f"{name}: the first stage needs less memory", verdict, f"{a:.0f} MiB against {b:.0f} MiB")


def _reached(name: str, runs: list[Run], scratch: list[Run]) -> Finding:
    """At which share of the steps, and of the FLOPs, the smoothed training loss is the last one from scratch."""
    steps, flops, memory = [], [], []
    for mine, other in zip(runs, scratch, strict=True):
        goal, smooth = _smooth(other.curve)[-1], _smooth(mine.curve)
        first = next((i for i, loss in enumerate(smooth) if loss <= goal), None)
        share = math.inf if first is None else mine.curve[first][0] / other.curve[-1][0]
        steps.append(share)
        flops.append(share * mine.flops / other.flops)
        memory.append(mine.memory[-1 if first is None else first] / other.memory[-1])
    claim = f"{name}: reaches the loss from scratch with 40% of the samples"
    if median(steps) == math.inf:
        return Finding(claim, "does not hold", "not reached")
    told = (
        f"{100 * median(steps):.0f}% of the samples, about {100 * median(flops):.0f}% of the FLOPs, "
        f"{100 * median(memory):.0f}% of the memory"
    )
    return Finding(claim, "holds" if median(steps) <= 0.4 else "does not hold", told)


def _smooth(curve: list[tuple[int, float]], width: int = 4) -> list[float]:
    """The mean of each loss and those just before it."""
    losses = [loss for _, loss in curve]
    windows = [losses[max(0, i - width + 1) : i + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
