"""M6-T: how much room experts need, and whether k helps when capacity stays that of k = 1."""

from __future__ import annotations

from pathlib import Path

from reproduce.common import Scale, Variant, compare, train_all, write_page

TITLE = "Capacity of the experts"
INTRO = (
    "16 experts. The capacity factor g lets an expert take ceil(g k T / N) of a batch's T tokens; what is above passes "
    "by the residual. With k = 2 and g = 0.625 the experts have the room of k = 1 with g = 1.25."
)


def run(scale: Scale, folder: Path, out: Path) -> Path:
    half = {
        "num_experts": 16,
        "experts_per_token": 2,
        "expert_intermediate_size": scale.sizes["intermediate_size"] // 2,
    }
    one = {"num_experts": 16, "experts_per_token": 1}
    runs = train_all(
        "capacity",
        [
            Variant("top-2, dropless", half),
            Variant("top-2, g 1.25", {**half, "capacity_factor": 1.25}),
            Variant("top-2, g 1", {**half, "capacity_factor": 1.0}),
            Variant("top-2, g 0.625", {**half, "capacity_factor": 0.625}),
            Variant("top-1, g 1.25", {**one, "capacity_factor": 1.25}),
            Variant("2 top-1, g 1.25", {**half, "capacity_factor": 1.25, "router": "prototype"}),
        ],
        scale,
        folder,
    )
    found = [
        compare("Dropless beats capacity 1.25", runs["top-2, dropless"], runs["top-2, g 1.25"]),
        compare("Capacity 1.25 beats 1", runs["top-2, g 1.25"], runs["top-2, g 1"]),
        compare("Top-2 with the room of top-1 still beats top-1", runs["top-2, g 0.625"], runs["top-1, g 1.25"]),
        compare("2 top-1 beats top-2 at capacity 1.25", runs["2 top-1, g 1.25"], runs["top-2, g 1.25"]),
    ]
    return write_page("capacity", TITLE, INTRO, scale, runs, found, out)
