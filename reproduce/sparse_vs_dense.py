"""Are parameters without FLOPs worth something: dense, wide dense, and more and more experts."""

from __future__ import annotations

from pathlib import Path

from reproduce.common import Scale, Variant, compare, train_all, write_page

TITLE = "Sparse against dense"
INTRO = (
    "Top-1 of more and more experts has the FLOPs of the dense network; the wide dense network has the FLOPs, and the "
    "parameters, of four feed-forwards."
)


def run(scale: Scale, folder: Path, out: Path) -> Path:
    wide = 4 * scale.sizes["intermediate_size"]
    experts = {f"{n} experts": {"num_experts": n, "experts_per_token": 1} for n in (4, 16, 64)}
    runs = train_all(
        "sparse-vs-dense",
        [
            Variant("dense"),
            Variant("dense, 4 x wide", {"intermediate_size": wide}),
            *(Variant(name, sizes) for name, sizes in experts.items()),
        ],
        scale,
        folder,
    )
    found = [
        compare("4 experts beat the dense network of equal FLOPs", runs["4 experts"], runs["dense"]),
        compare("16 experts beat 4", runs["16 experts"], runs["4 experts"]),
        compare("64 experts beat 16", runs["64 experts"], runs["16 experts"]),
        compare("16 experts beat the dense network of 4 times the FLOPs", runs["16 experts"], runs["dense, 4 x wide"]),
    ]
    return write_page("sparse_vs_dense", TITLE, INTRO, scale, runs, found, out)
