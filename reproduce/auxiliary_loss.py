"""M6-T: is a loss that balances the experts needed? With its modern forms beside it."""

from __future__ import annotations

from pathlib import Path

from reproduce.common import Run, Scale, Variant, compare, train_all, write_page

TITLE = "Balance: auxiliary loss, biases, or nothing"
INTRO = (
    "Top-2 of 16 experts, dropless. M6-T found that an auxiliary loss evens the loads and does not help the model; "
    "later work blames its use on small batches, and balances by biases instead. Here the loss is over the whole batch."
)
SIZES = {"num_experts": 16, "experts_per_token": 2}


def run(scale: Scale, folder: Path, out: Path) -> Path:
    sizes = {**SIZES, "expert_intermediate_size": scale.sizes["intermediate_size"] // 2}
    runs: dict[str, list[Run]] = train_all(
        "auxiliary-loss",
        [
            Variant("nothing", sizes),
            Variant("auxiliary loss 0.01", {**sizes, "auxiliary_loss": 0.01}),
            Variant("auxiliary loss 0.1", {**sizes, "auxiliary_loss": 0.1}),
            Variant("biases", {**sizes, "bias_update": 1e-3}),
            Variant("2 top-1, nothing", {**sizes, "router": "prototype"}),
        ],
        scale,
        folder,
    )
    found = [
        compare("No balance is better than the auxiliary loss (0.01)", runs["nothing"], runs["auxiliary loss 0.01"]),
        compare("No balance is better than a strong one (0.1)", runs["nothing"], runs["auxiliary loss 0.1"]),
        compare("Biases are better than the auxiliary loss (0.01)", runs["biases"], runs["auxiliary loss 0.01"]),
        compare("Biases are better than nothing", runs["biases"], runs["nothing"]),
    ]
    return write_page("auxiliary_loss", TITLE, INTRO, scale, runs, found, out)
