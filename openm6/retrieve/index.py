"""A vector index: a LanceDB table on disk, searched in memory by faiss.

    DIR/items.lance     id, vector, and columns to filter by; every change is an atomic version
    DIR/index.json      dims, columns, and the model and task of the vectors
    DIR/ann.json        inverted lists of a snapshot, if `tune` was called, and the name of their ann-*.faiss file

Vectors are normalized to length 1; the score of a hit is the cosine similarity. Without inverted lists every search is
exact. With them a search without a filter probes some of the lists, and all items added since the snapshot; a search
with a filter stays exact. One process writes at a time, others wait; readers see the last committed version.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.extras import require
from openm6.core.files import require_new, write_whole
from openm6.retrieve.columns import convert_at, filter_error, id_of, type_of
from openm6.retrieve.memory import ALL, LISTS, Lists, Memory

TABLE = "items"
COMPACT_EVERY = 64
"""Number of versions between compactions, which merge small files and drop versions older than a day."""

KEYS_A_VERSION = 1_000_000_007
"""Key range per version: keys are never reused, so that a deleted row is not taken for a later one. Odd, since faiss
hashes the low bits of keys."""

SETTLED = 1_000_000_000
"""Age in nanoseconds above which a modification time is unambiguous."""


@dataclass(frozen=True, slots=True)
class Hit:
    id: str
    score: float
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Items:
    """All items: ids [N], unit vectors fp32 [N, dims], columns as lists."""

    ids: np.ndarray
    vectors: np.ndarray
    columns: dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Added:
    """Ids stored by a call of `add`: new items and replaced ones."""

    new: list[str]
    replaced: list[str]


@dataclass(frozen=True, slots=True)
class Deleted:
    """Ids removed by a call of `delete`, and given ids that the index does not have."""

    deleted: list[str]
    unknown: list[str]


class Index:
    """A vector index, opened by `Index.create` or `Index.open`."""

    def __init__(self, path: Path, table: Any, about: dict[str, Any], pinned: bool = False):
        self.path, self.about, self._pinned = path, about, pinned
        self.dims = int(about["dims"])
        self._table, self._memory = table, Memory(self.dims)
        self._ann: Lists | None = None
        self._seen: dict[str, tuple[int, int]] = {}
        self._followed = False  # True while the memory is at the table's version

    @classmethod
    def create(
        cls, path: str | Path, dims: int, columns: Mapping[str, str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Index:  # fmt: skip
        """Create an empty index. `columns`: name to type (text, int, float or bool); `about`: metadata to store, such
        as the model. Raises UsageError for an existing path."""
        require("retrieve", "lancedb", "pyarrow", "faiss", "lightgbm")
        import lancedb
        import pyarrow as pa

        path = Path(path)
        require_new(path)
        if dims < 1:
            raise UsageError(f"dims is {dims}; vectors need at least 1.")
        fields = [("key", pa.int64()), ("id", pa.string()), ("vector", pa.list_(pa.float32(), dims))]
        types = {name: type_of(name, kind) for name, kind in (columns or {}).items()}
        for name, kind in types.items():
            if name in ("key", "id", "vector") or not name.isidentifier():
                raise UsageError(
                    f"A column cannot be called {name!r}: use letters, digits and _, except key, id, vector."
                )
            fields.append((name, pa.type_for_alias(kind)))
        content = {**(about or {}), "dims": dims, "columns": types}

        def fill(folder: Path) -> None:
            lancedb.connect(str(folder)).create_table(TABLE, schema=pa.schema(fields))
            (folder / "index.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")

        write_whole(path, fill)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> Index:
        """Open an index, at an older `version` read-only. Raises UsageError for a path that is not an index."""
        require("retrieve", "lancedb", "pyarrow", "faiss", "lightgbm")
        import lancedb

        path = Path(path)
        try:
            about = json.loads((path / "index.json").read_text("utf-8"))
            table = lancedb.connect(str(path)).open_table(TABLE)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} is not an index ({type(error).__name__}): build one by `openm6 index build`."
            ) from None
        if version is not None:
            try:
                table.checkout(version)
            except (ValueError, RuntimeError, OSError):
                known = [row["version"] for row in table.list_versions()]
                raise UsageError(f"{path} has no version {version}; it has {min(known)} to {max(known)}.") from None
        return cls(path, table, about, pinned=version is not None)

    def __len__(self) -> int:
        self._latest()
        return int(self._table.count_rows())

    @property
    def version(self) -> int:
        return int(self._table.version)

    def versions(self) -> list[dict[str, Any]]:
        """Number and time of each stored version."""
        return [{"version": v["version"], "time": str(v["timestamp"])} for v in self._table.list_versions()]

    def ids(self) -> set[str]:
        self._latest()
        return set(self._read(["id"])["id"].to_pylist())

    def items(self, columns: Sequence[str] = ()) -> Items:
        """All items, in the order of insertion."""
        self._latest()
        rows = self._read(["key", "id", "vector", *columns]).sort_by("key").combine_chunks()
        flat = np.concatenate([np.asarray(chunk.flatten()) for chunk in rows["vector"].chunks] or [np.zeros(0)])
        return Items(
            np.array(rows["id"].to_pylist(), object), flat.astype(np.float32).reshape(-1, self.dims),
            {name: rows[name].to_pylist() for name in columns},
        )  # fmt: skip

    def add(self, ids: Sequence[str], vectors: np.ndarray, columns: Mapping[str, Sequence[Any]] | None = None) -> Added:
        """Add or replace items: `vectors` fp32 [N, dims], and for each id a value of every column. They are durable on
        return. Raises DataError for invalid vectors, ids or columns, and for values that cannot be stored exactly."""
        import pyarrow as pa

        vectors = np.asarray(vectors, np.float32)
        names = [id_of(f"Item {number}", name) for number, name in enumerate(ids)]
        if vectors.ndim != 2 or vectors.shape != (len(names), self.dims):
            shape = list(vectors.shape)
            raise DataError(f"Vectors of shape {shape} for {len(names)} ids; the index has {self.dims} dims.")
        if not np.isfinite(vectors).all():
            raise DataError("A vector has values that are not finite.")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"The id {twice} is given twice in one call.")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not lengths.all():
            raise DataError(f"The vector of {names[int(lengths.argmin())]} is zero and cannot be normalized.")
        given, known = dict(columns or {}), self.about["columns"]
        if given.keys() != known.keys():
            raise DataError(f"The index has the columns {', '.join(known) or '(none)'}; given: {', '.join(given)}.")
        for name, values in given.items():
            if len(values) != len(names):
                raise DataError(f"The column {name} has {len(values)} values for {len(names)} ids.")
        stored = {
            name: [convert_at(f"The item {one}", name, v, kind) for one, v in zip(names, given[name], strict=True)]
            for name, kind in known.items()
        }
        with self._writing():
            parts = [pa.array(np.arange(len(names)) + self.version * KEYS_A_VERSION), pa.array(names, pa.string())]
            flat = pa.array((vectors / lengths).ravel())
            parts.append(pa.FixedSizeListArray.from_arrays(flat, self.dims))
            parts += [pa.array(stored[name], pa.type_for_alias(kind)) for name, kind in known.items()]
            rows = pa.table(parts, schema=self._table.schema)
            merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            before, merged = self.version, merge.execute(rows)
            there = set(names) if merged.num_updated_rows else set()
            if merged.num_updated_rows and merged.num_inserted_rows:
                there = Index.open(self.path, before).ids()
        return Added([n for n in names if n not in there], [n for n in names if n in there])

    def delete(self, ids: Sequence[str] = (), where: str = "") -> Deleted:
        """Delete items by id or by an SQL filter `where`. Raises UsageError unless exactly one is given."""
        if bool(len(ids)) == bool(where):
            raise UsageError("Give the items to delete by ids or by a filter.")
        names = list(dict.fromkeys(map(str, ids)))
        if names:
            quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
            where = f"id IN ({quoted})"
        with self._writing():
            found = self._matching("id", where).to_pylist()
            if found:
                self._table.delete(where)
        there = set(found)
        return Deleted(found, [name for name in names if name not in there])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        from filelock import FileLock

        if self._pinned:
            raise UsageError(f"{self.path} was opened at version {self.version}, which is read-only.")
        with FileLock(str(self.path / "write.lock")):
            self._latest()
            try:
                yield
            except OSError as error:
                raise OpenM6Error(f"{self.path} cannot be written ({error.strerror or error}).") from None
            if self.version % COMPACT_EVERY == 0:
                self._table.optimize()

    def _latest(self) -> None:
        """Check out the latest version, which another process may have written."""
        if not self._pinned and self._changed(f"{TABLE}.lance/_versions"):
            self._table.checkout_latest()
            self._followed = False

    def _follow(self) -> None:
        """Bring the memory to the latest version of the table."""
        self._latest()
        if not self._followed:
            self._memory.follow(self._table)
            self._followed = True

    def _changed(self, name: str) -> bool:
        """True if a file or folder of the index may have been written since the last call, by its modification time,
        which takes 1% of the time of reading. A recent one is ambiguous: another write may have the same time."""
        try:
            found = os.stat(f"{self.path}/{name}")
        except OSError:
            return True
        now = (found.st_mtime_ns, found.st_ino)
        same, settled = self._seen.get(name) == now, time.time_ns() - found.st_mtime_ns > SETTLED
        self._seen[name] = now if settled else (0, 0)
        return not same

    def search(
        self, vectors: np.ndarray, k: int = 10, *, where: str = "", columns: Sequence[str] = (), exact: bool = False
    ) -> list[list[Hit]]:
        """The at most k nearest items of each vector, fp32 [Q, dims] or [dims], nearest first.

        `where`: SQL condition on the columns (`price < 100 AND colour = 'red'`); `columns`: columns to return with the
        hits; `exact`: search all items instead of inverted lists. Raises UsageError for an invalid condition.
        """
        unknown = [name for name in columns if name not in self.about["columns"]]
        if unknown:
            raise UsageError(f"The index has no column {unknown[0]}. It has: {', '.join(self.about['columns'])}.")
        scores, places = self._found(vectors, k, where, exact)
        values = self._columns_of({int(p) for p in places.flat if p >= 0}, columns) if columns else {}
        rows = zip(places.tolist(), self._memory.ids[places].tolist(), scores.tolist(), strict=True)
        return [[Hit(i, s, values.get(p, {})) for p, i, s in zip(*row, strict=True) if p >= 0] for row in rows]

    def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids [Q, k] of the nearest items of many vectors; missing ones have score -inf and id None. Errors:
        see `search`."""
        scores, places = self._found(vectors, k, "", False)
        ids = np.full(places.shape, None, object)
        ids[places >= 0] = self._memory.ids[places[places >= 0]]
        return np.where(places >= 0, scores, -np.inf), ids

    def _found(self, vectors: np.ndarray, k: int, where: str, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        queries = np.atleast_2d(np.asarray(vectors, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dims:
            raise UsageError(f"A vector of {queries.shape[-1]} dimensions; the index has {self.dims}.")
        if k < 1:
            raise UsageError(f"k is {k}; it has to be at least 1.")
        queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-30)
        self._follow()
        chosen = np.asarray(self._matching("key", where)) if where else None
        lists = None if exact or where or self._pinned else self._lists()
        return self._memory.search(queries, min(k, max(1, len(self._memory.keys))), chosen, lists)

    def _columns_of(self, places: set[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        if not places:
            return {}
        by_key = {int(self._memory.keys[p]): p for p in places}
        rows = self._read(["key", *columns], f"key IN ({', '.join(map(str, by_key))})")
        return {by_key[row.pop("key")]: row for row in rows.to_pylist()}

    def _read(self, columns: Sequence[str], where: str = "") -> Any:
        """These columns of the items that pass a filter, as an Arrow table."""
        query = self._table.search().select(columns).limit(ALL)
        return (query.where(where) if where else query).to_arrow()

    def _matching(self, column: str, where: str) -> Any:
        """A column of the items that pass a caller's filter. Raises UsageError for an invalid one."""
        try:
            return self._read([column], where)[column]
        except (ValueError, RuntimeError) as error:
            raise filter_error(where, error, self.about["columns"]) from None

    def tune(self, recall: float = 0.95, lists: int | None = None, seed: int = 0) -> dict[str, Any]:
        """Build inverted lists and choose the number of probes for this recall@10, measured on 256 slightly perturbed
        items. Returns {"lists", "probes", "recall@10", "items", ...}."""
        self._follow()
        made = Lists.build(self._memory, lists, recall, seed)
        made.save(self.path)
        self._ann = made
        return made.about

    def _lists(self) -> Lists | None:
        if self._changed(LISTS):
            self._ann = Lists.load(self.path, self._ann)
        return self._ann
