"""An index of a million vectors against faiss alone: how long filling takes, and queries a second at recall@10 0.95.

Both sides search the same vectors with inverted lists that were cut in the same way and looked into as far as the
recall takes; ours sees to versions, ids, and items that came later besides. Queries go one and 64 at a time.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Timing, race
from openm6.retrieve import Index
from openm6.retrieve.memory import Lists, Memory

TITLE = "An index of vectors against faiss"
ITEMS, DIMS, QUERIES, BATCH = 1_000_000, 256, 256, 50_000
RECALL = 0.95


def vectors_like_a_catalogue(count: int, seed: int, dims: int = DIMS) -> np.ndarray:
    """Unit vectors about 5,000 middles that themselves lie about 50: fp32 [count, dims]."""
    middles = np.random.default_rng(0).normal(size=(50, dims))
    near = np.random.default_rng(1).normal(0, 0.7, (5_000, dims)) + middles[np.arange(5_000) % 50]
    rng = np.random.default_rng(seed)
    made = (near[rng.integers(len(near), size=count)] + rng.normal(0, 0.7, (count, dims))).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def run(
    items: int = ITEMS, queries: int = QUERIES, root: Path = ROOT / "bench-index"
) -> tuple[list[dict[str, Any]], str]:
    import faiss

    shutil.rmtree(root, ignore_errors=True)
    vectors, asked = vectors_like_a_catalogue(items, 2), vectors_like_a_catalogue(queries, 3)
    started = time.perf_counter()
    index = Index.create(root / "items", DIMS, {"price": "int64"})
    for first in range(0, items, BATCH):
        some = range(first, min(items, first + BATCH))
        index.add([str(i) for i in some], vectors[first : first + BATCH], {"price": [i % 1000 for i in some]})
    filled = time.perf_counter() - started
    started = time.perf_counter()
    index.search(asked[:1], 10)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    about = index.tune(RECALL)
    tuned = time.perf_counter() - started

    right = faiss.knn(asked, vectors, 10, faiss.METRIC_INNER_PRODUCT)[1]
    peer = _peer(vectors)
    where = "price < 20"
    few = np.flatnonzero(np.arange(items) % 1000 < 20)
    best = few[faiss.knn(asked[:32], vectors[few], 10, faiss.METRIC_INNER_PRODUCT)[1]]
    exact = [[int(hit.id) for hit in row] for row in index.search(asked[:32], 10, where=where)]

    rows: list[dict[str, Any]] = []
    for size in (1, 64):
        parts = [asked[i : i + size] for i in range(0, queries, size)]
        sides = {
            "openm6": lambda parts=parts: [index.search(part, 10) for part in parts],
            "faiss": lambda parts=parts: [peer.search(part, 10) for part in parts],
        }
        times = race(sides, repeats=5, warmup=1)
        rows += [_row(name, size, timing, queries, times["faiss"]) for name, timing in times.items()]
    ours = np.array([[int(hit.id) for hit in row] for row in index.search(asked, 10)])
    theirs = peer.search(asked, 10)[1]
    found = {"openm6": _recall(ours, right), "faiss": _recall(theirs, right)}
    for row in rows:
        row["recall@10"] = round(found[row["side"]], 3)
        print(row, flush=True)
    same = np.mean([a == b.tolist() for a, b in zip(exact, best, strict=True)])
    note = (
        f"{items:,} vectors of {DIMS} numbers; added in {filled:.0f} s ({BATCH:,} a call, each kept when it returns), "
        f"read into memory in {opened:.1f} s, cut into {about['lists']} lists in {tuned:.0f} s ({about['probes']} "
        f"looked into). With a filter that leaves 2%, {same:.0%} of 32 answers are exactly those of a full search."
    )
    shutil.rmtree(root)
    return rows, note


def _peer(vectors: np.ndarray) -> Any:
    """faiss's lists without an index of ours around them, made by the same rule."""
    memory = Memory(vectors.shape[1])
    memory.flat.add(vectors)
    memory.keys, memory.alive = np.arange(len(vectors)), np.ones(len(vectors), bool)
    made = Lists.build(memory, None, RECALL, 0)
    made.lists.nprobe = made.about["probes"]
    return made.lists


def _recall(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), right.tolist(), strict=True)]))


def _row(name: str, size: int, timing: Timing, queries: int, peer: Timing) -> dict[str, Any]:
    return {
        "side": name, "queries at once": size, "queries/s": round(queries / timing.median),
        "lowest": round(queries / timing.high), "highest": round(queries / timing.low),
        "of faiss": round(peer.median / timing.median, 2),
    }  # fmt: skip
