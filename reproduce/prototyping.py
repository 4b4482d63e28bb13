"""M6-T (arXiv 2105.15082): k top-1 against top-k, and sparse against dense, at equal activated FLOPs."""

from __future__ import annotations

from pathlib import Path

from reproduce.common import Finding, Run, Scale, Variant, compare, faster, train_all, write_page

TITLE = "Expert prototyping: k top-1 against top-k"
INTRO = (
    "Every token goes through feed-forwards of the same total width, and all sparse networks have the same number of "
    "parameters: with k experts a token, experts are 1/k as wide and k times as many."
)
EXPERTS = 16


def variants(scale: Scale) -> list[Variant]:
    width = scale.sizes["intermediate_size"]

    def sparse(name: str, chosen: int, router: str) -> Variant:
        return Variant(
            name,
            {
                "num_experts": EXPERTS * chosen, "experts_per_token": chosen, "router": router,
                "expert_intermediate_size": width // chosen,
            },
        )  # fmt: skip

    return [
        Variant("dense"),
        sparse("top-1", 1, "topk"),
        sparse("top-2", 2, "topk"),
        sparse("top-4", 4, "topk"),
        sparse("2 top-1", 2, "prototype"),
        sparse("4 top-1", 4, "prototype"),
    ]


def findings(runs: dict[str, list[Run]]) -> list[Finding]:
    return [
        compare("Experts beat a dense network of equal FLOPs", runs["top-1"], runs["dense"]),
        compare("Top-2 beats top-1", runs["top-2"], runs["top-1"]),
        compare("Top-4 beats top-2", runs["top-4"], runs["top-2"]),
        compare("2 top-1 beats top-1", runs["2 top-1"], runs["top-1"]),
        compare("2 top-1 beats top-2", runs["2 top-1"], runs["top-2"]),
        compare("4 top-1 beats top-4", runs["4 top-1"], runs["top-4"]),
        faster("A step of top-1 is quicker than one of top-4", runs["top-1"], runs["top-4"]),
        faster("A step of 4 top-1 is quicker than one of top-4", runs["4 top-1"], runs["top-4"]),
    ]


def run(scale: Scale, folder: Path, out: Path) -> Path:
    runs = train_all("prototyping", variants(scale), scale, folder)
    return write_page("prototyping", TITLE, INTRO, scale, runs, findings(runs), out)
