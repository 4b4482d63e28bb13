"""In-memory search of an index: the vectors of a version of its table, and inverted lists of a snapshot (faiss)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import UsageError
from openm6.core.files import write_file, write_json

LISTS = "ann.json"
"""File beside the table that describes the inverted lists."""
ALL = 2**31 - 1
"""A limit that reads all rows."""


class Memory:
    """Keys, ids and vectors of a version of the table; deleted rows stay, masked, until there are many."""

    def __init__(self, dims: int):
        self.dims = dims
        self._clear()

    def _clear(self) -> None:
        import faiss

        self.version = -1
        self.keys, self.ids = np.zeros(0, np.int64), np.zeros(0, object)
        self.alive = np.zeros(0, bool)
        self._gone = self._living = None  # selectors of keys; the second refers to the first
        self.flat = faiss.IndexFlatIP(self.dims)

    def follow(self, table: Any) -> None:
        """Update to the table's version: read new rows, mask deleted ones."""
        import faiss

        if table.version == self.version:
            return
        last = int(self.keys[-1]) if len(self.keys) else -1
        keys = np.asarray(table.search().select(["key"]).limit(ALL).to_arrow()["key"])
        old = keys[keys <= last]
        alive = self._mask(old)
        if alive.sum() < len(old) or len(old) < 0.8 * len(self.keys):  # an older version, or many are gone
            self._clear()
            last, alive = -1, self.alive
        self.alive = alive
        if (keys > last).any():
            rows = table.search().where(f"key > {last}").select(["key", "id", "vector"]).limit(ALL).to_arrow()
            rows = rows.sort_by("key").combine_chunks()
            self.flat.add(np.asarray(rows["vector"].chunk(0).flatten()).reshape(-1, self.dims))
            self.keys = np.concatenate((self.keys, np.asarray(rows["key"])))
            self.ids = np.concatenate((self.ids, np.array(rows["id"].to_pylist(), object)))
            self.alive = np.concatenate((self.alive, np.ones(len(rows), bool)))
        dead = self.keys[~self.alive]
        self._gone = faiss.IDSelectorBatch(dead) if len(dead) else None
        self._living = faiss.IDSelectorNot(self._gone) if self._gone else None
        self.version = table.version

    def _mask(self, keys: np.ndarray) -> np.ndarray:
        """Mask of the rows with one of these keys, none of which exceeds the last key."""
        places = np.searchsorted(self.keys, keys)
        mask = np.zeros(len(self.keys), bool)
        mask[places[self.keys[places] == keys]] = True
        return mask

    def search(
        self, queries: np.ndarray, k: int, chosen: np.ndarray | None, lists: Lists | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places [Q, k] among the keys `chosen`, or all; missing ones have place -1."""
        if not self.alive.any():
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if lists is None:
            mask = self.alive if chosen is None else self.alive & self._mask(chosen)
            return self._exact(queries, k, mask)
        scores, keys = lists.search(queries, k, self._living)
        places = np.searchsorted(self.keys, keys)
        places[keys < 0] = -1
        first = int(np.searchsorted(self.keys, lists.about["last"], "right"))
        if self.alive[first:].any():
            after = self.alive & (np.arange(len(self.keys)) >= first)
            more, where = self._exact(queries, k, after)
            scores, places = np.concatenate((scores, more), 1), np.concatenate((places, where), 1)
            scores[places < 0] = -np.inf
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
        return scores, places

    def _exact(self, queries: np.ndarray, k: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        if mask.all():
            return self.flat.search(queries, k)  # type: ignore[no-any-return]
        bits = np.packbits(mask, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(bits))
        return self.flat.search(queries, k, params=faiss.SearchParameters(sel=selector))  # type: ignore[no-any-return]


class Lists:
    """Inverted lists (IVF) over the vectors of a snapshot, by key."""

    def __init__(self, lists: Any, about: dict[str, Any]):
        self.lists, self.about = lists, about
        lists.nprobe = about["probes"]

    @classmethod
    def build(cls, memory: Memory, number: int | None, recall: float, seed: int) -> Lists:
        import faiss

        count = int(memory.alive.sum())
        number = number or max(1, round(4 * count**0.5))
        if count < max(64, number):
            raise UsageError(f"{count} items are too few for {number} inverted lists; exact search is fast enough.")
        vectors = memory.flat.reconstruct_n(0, len(memory.keys))[memory.alive]
        keys = memory.keys[memory.alive]
        lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(memory.dims), memory.dims, number, faiss.METRIC_INNER_PRODUCT)
        lists.cp.seed, lists.cp.max_points_per_centroid = seed + 1, 64
        lists.train(vectors)
        lists.add_with_ids(vectors, keys)
        rng = np.random.default_rng(seed)
        asked = vectors[rng.choice(count, min(256, count), replace=False)]
        asked = asked + rng.normal(0, 0.3 / memory.dims**0.5, asked.shape).astype(np.float32)
        right = keys[faiss.knn(asked, vectors, min(10, count), faiss.METRIC_INNER_PRODUCT)[1]]
        probes, found = 0, -1.0
        while found < recall and probes < number:
            lists.nprobe = probes = min(number, max(probes + 1, round(probes * 1.25)))
            got = lists.search(asked, right.shape[1])[1]
            found = float((right[:, :, None] == got[:, None, :]).any(2).mean())
        about = {"lists": number, "probes": probes, "recall@10": found, "items": count, "last": int(keys.max())}
        return cls(lists, {**about, "stamp": os.urandom(8).hex()})

    def search(self, queries: np.ndarray, k: int, among: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores and keys [Q, k]; missing ones have key -1. `among`: a selector of keys."""
        import faiss

        if among is None:
            return self.lists.search(queries, k)  # type: ignore[no-any-return]
        params = faiss.SearchParametersIVF(nprobe=self.about["probes"], sel=among)
        return self.lists.search(queries, k, params=params)  # type: ignore[no-any-return]

    def save(self, path: Path) -> None:
        """Write the lists first, then the file that describes them."""
        import faiss

        file = f"ann-{self.about['stamp']}.faiss"
        write_file(path / file, lambda draft: faiss.write_index(self.lists, str(draft)))
        write_json(path / LISTS, {**self.about, "file": file})
        for other in path.glob("ann-*.faiss"):
            if other.name != file:
                other.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, opened: Lists | None = None) -> Lists | None:
        """The lists of an index, `opened` if they are those; None if they cannot be read: then searches are exact."""
        import faiss

        try:
            about = json.loads((path / LISTS).read_text("utf-8"))
            if opened and opened.about["stamp"] == about["stamp"]:
                return opened
            return cls(faiss.read_index(str(path / about["file"])), about)
        except (OSError, ValueError, KeyError, RuntimeError):
            return None
