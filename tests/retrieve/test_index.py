"""The index against a naive search, through changes, versions, kills and two writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from openm6.core.errors import DataError, UsageError
from openm6.retrieve import Index

COLUMNS = {"colour": "string", "price": "float64", "stock": "int64", "new": "bool"}


def rows(
    count: int, seed: int = 0, dims: int = 8, start: int = 0
) -> tuple[list[str], np.ndarray, dict[str, list[Any]]]:
    rng = np.random.default_rng(seed)
    names = [f"i{number}" for number in range(start, start + count)]
    kept = {
        "colour": [("红", "蓝", "绿")[n] for n in rng.integers(3, size=count)],
        "price": rng.uniform(0, 100, count).tolist(),
        "stock": rng.integers(9, size=count).tolist(),
        "new": (rng.random(count) < 0.5).tolist(),
    }
    return names, rng.normal(size=(count, dims)).astype(np.float32), kept


def filled(path: Path, count: int = 40) -> tuple[Index, list[str], np.ndarray, dict[str, list[Any]]]:
    index = Index.create(path / "index", 8, COLUMNS)
    given_ = rows(count)
    index.add(*given_)
    return index, *given_


def nearest(query: np.ndarray, names: list[str], vectors: np.ndarray, k: int) -> list[str]:
    likeness = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    return [names[i] for i in np.argsort(-likeness, kind="stable")[:k]]


def ids(hits: list[Any]) -> list[str]:
    return [hit.id for hit in hits]


def test_it_finds_what_a_naive_search_finds_and_tells_cosines(tmp_path: Path) -> None:
    index, names, vectors, kept = filled(tmp_path)
    queries = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    for query, hits in zip(queries, index.search(queries, 7, columns=["colour", "price"]), strict=True):
        assert ids(hits) == nearest(query, names, vectors, 7)
        for hit in hits:
            place = names.index(hit.id)
            cosine = vectors[place] @ query / np.linalg.norm(vectors[place]) / np.linalg.norm(query)
            assert hit.score == pytest.approx(cosine, abs=1e-5)
            assert hit.columns == {"colour": kept["colour"][place], "price": pytest.approx(kept["price"][place])}
    assert len(index.search(queries[0], 999)[0]) == len(index) == 40


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("colour = '红'", lambda r: r["colour"] == "红"),
        ("price < 30 AND new", lambda r: r["price"] < 30 and r["new"]),
        ("stock IN (1, 2) OR colour != '蓝'", lambda r: r["stock"] in (1, 2) or r["colour"] != "蓝"),
        ("price > 1000", lambda r: False), ("id = 'i3'", lambda r: r["id"] == "i3"),
    ],
)  # fmt: skip
def test_filters_are_exact(tmp_path: Path, where: str, keep: Any) -> None:
    index, names, vectors, kept = filled(tmp_path, 200)
    table = [{"id": n, **{k: v[i] for k, v in kept.items()}} for i, n in enumerate(names)]
    inside = [i for i, row in enumerate(table) if keep(row)]
    query = np.ones(8, np.float32)
    expected = nearest(query, [names[i] for i in inside], vectors[inside], 10)
    assert ids(index.search(query, 10, where=where)[0]) == expected
    index.tune(lists=8)
    assert ids(index.search(query, 10, where=where)[0]) == expected


@pytest.mark.slow
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["add", "delete", "search"]), st.integers(0, 30)), min_size=3, max_size=12))
def test_any_order_of_changes_gives_what_a_dictionary_gives(tmp_path_factory: Any, changes: list) -> None:
    index = Index.create(tmp_path_factory.mktemp("any") / "index", 4)
    held: dict[str, np.ndarray] = {}
    for step, (what, number) in enumerate(changes):
        rng = np.random.default_rng(step)
        if what == "add":
            names = [f"i{n}" for n in rng.permutation(20)[: number % 7 + 1]]
            vectors = rng.normal(size=(len(names), 4)).astype(np.float32)
            added = index.add(names, vectors)
            assert added.new == [n for n in names if n not in held]
            assert added.replaced == [n for n in names if n in held]
            held |= dict(zip(names, vectors, strict=True))
        elif what == "delete":
            names = [f"i{n}" for n in rng.permutation(20)[: number % 9 + 1]]
            there = [name for name in names if held.pop(name, None) is not None]
            gone = index.delete(names)
            assert sorted(gone.deleted) == sorted(there) and gone.unknown == [n for n in names if n not in there]
        query = rng.normal(size=4).astype(np.float32)
        expected = nearest(query, list(held), np.stack(list(held.values())), 5) if held else []
        assert ids(index.search(query, 5)[0]) == expected and len(index) == len(held)
    assert index.ids() == set(held)


def test_what_comes_after_the_newest_was_deleted_is_found_as_itself(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", 8)
    vectors = np.eye(8, dtype=np.float32)
    index.add([f"i{n}" for n in range(7)], vectors[:7])
    assert ids(index.search(vectors[6], 1)[0]) == ["i6"]
    index.delete(["i6"])
    assert len(index.search(vectors[6], 8)[0]) == 6
    index.add(["new"], vectors[7:])
    assert ids(index.search(vectors[7], 1)[0]) == ["new"]
    assert "i6" not in ids(index.search(vectors[6], 8)[0])


def test_versions_are_kept_and_can_be_opened(tmp_path: Path) -> None:
    index, names, vectors, _ = filled(tmp_path)
    first = index.version
    index.delete(where="colour = '红'")
    old = Index.open(tmp_path / "index", first)
    assert len(old) == 40 > len(index) and ids(old.search(vectors[0], 1)[0]) == [names[0]]
    assert {v["version"] for v in index.versions()} >= {first, index.version}
    with pytest.raises(UsageError, match="which is read-only"):
        old.delete(["i1"])
    with pytest.raises(UsageError, match="has no version 99"):
        Index.open(tmp_path / "index", 99)


def test_an_open_reader_sees_what_another_has_written(tmp_path: Path) -> None:
    writer, names, vectors, _ = filled(tmp_path)
    reader = Index.open(tmp_path / "index")
    assert ids(reader.search(vectors[2], 1)[0]) == [names[2]]
    writer.delete([names[2]])
    assert ids(reader.search(vectors[2], 1)[0]) != [names[2]] and len(reader) == 39


def test_inverted_lists_find_nearly_all_and_what_came_after_them(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", 16)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 16))
    vectors = (centres[rng.integers(30, size=3000)] + 0.4 * rng.normal(size=(3000, 16))).astype(np.float32)
    names = [str(n) for n in range(3000)]
    index.add(names, vectors)
    told = index.tune(recall=0.95, lists=50)
    assert told["recall@10"] >= 0.95 and told["probes"] < 50
    queries = vectors[rng.permutation(3000)[:100]] + 0.05 * rng.normal(size=(100, 16)).astype(np.float32)

    def recall(at: Index) -> float:
        pairs = zip(at.search(queries, 10), at.search(queries, 10, exact=True), strict=True)
        return float(np.mean([len({*ids(a)} & {*ids(b)}) / 10 for a, b in pairs]))

    assert 0.9 < recall(index) <= 1
    far = 50 * np.eye(16, dtype=np.float32)[:3]
    index.add(["new 1", "new 2", names[0]], far)  # the third is replaced
    gone = ids(index.search(queries[5], 3)[0])
    index.delete(gone)
    for at in (index, Index.open(tmp_path / "index")):
        assert ids(at.search(far[0], 1)[0]) == ["new 1"] and ids(at.search(far[2], 1)[0]) == [names[0]]
        assert not {*ids(at.search(queries[5], 10)[0])} & {*gone} and recall(at) > 0.9


def test_damaged_lists_are_left_aside(tmp_path: Path) -> None:
    index, names, vectors, _ = filled(tmp_path, 200)
    index.tune(lists=8)
    next((tmp_path / "index").glob("ann-*.faiss")).write_bytes(b"nothing")
    again = Index.open(tmp_path / "index")
    assert ids(again.search(vectors[7], 1)[0]) == [names[7]]


ADDING = """
import sys
import numpy as np
from openm6.retrieve import Index
index, start = Index.open(sys.argv[1]), int(sys.argv[2])
for number in range(start, start + int(sys.argv[3])):
    vectors = np.random.default_rng(number).normal(size=(5, 8))
    index.add([f"{number}.{i}" for i in range(5)], vectors)
    print(number, flush=True)
"""


def adding(path: Path, start: int, count: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", ADDING, str(path), str(start), str(count)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_adding_loses_nothing_that_was_told_as_kept(tmp_path: Path) -> None:
    Index.create(tmp_path / "index", 8)
    for round_ in range(3):
        process = adding(tmp_path / "index", 1000 * round_, 900)
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(4 + round_)]
        time.sleep(0.03 * round_)
        os.kill(process.pid, signal.SIGKILL)
        told += process.stdout.readlines()
        process.wait()
        numbers = [int(line) for line in told if line.endswith("\n")]
        index = Index.open(tmp_path / "index")
        held = index.ids()
        assert {f"{n}.{i}" for n in numbers for i in range(5)} <= held
        assert len(held) % 5 == 0  # a call is kept whole or not at all
        query = np.random.default_rng(numbers[-1]).normal(size=(5, 8))
        assert ids(index.search(query[3], 1)[0]) == [f"{numbers[-1]}.3"]


@pytest.mark.slow
def test_two_processes_add_at_the_same_time(tmp_path: Path) -> None:
    Index.create(tmp_path / "index", 8)
    both = [adding(tmp_path / "index", start, 12) for start in (0, 100)]
    assert [process.wait(120) for process in both] == [0, 0]
    index = Index.open(tmp_path / "index")
    assert index.ids() == {f"{n}.{i}" for start in (0, 100) for n in range(start, start + 12) for i in range(5)}
    assert set(ids(index.search(np.ones(8), 200)[0])) == index.ids()


def test_a_damaged_table_is_not_told_as_a_wrong_filter(tmp_path: Path) -> None:
    filled(tmp_path)
    for file in (tmp_path / "index/items.lance/data").iterdir():
        file.unlink()
    damaged = Index.open(tmp_path / "index")
    for read in (damaged.ids, damaged.items):
        with pytest.raises(RuntimeError, match="Not found"):
            read()


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    index, names, vectors, kept = filled(tmp_path)
    with pytest.raises(UsageError, match="vector of 5 dimensions; the index has 8"):
        index.search(np.ones(5))
    with pytest.raises(UsageError, match="k is 0"):
        index.search(np.ones(8), 0)
    with pytest.raises(UsageError, match="filter 'colr = 1' cannot be used: .*colr"):
        index.search(np.ones(8), where="colr = 1")
    with pytest.raises(UsageError, match="no column weight"):
        index.search(np.ones(8), columns=["weight"])
    with pytest.raises(DataError, match=r"shape \[2, 3\] for 2 ids; the index has 8"):
        index.add(["a", "b"], np.ones((2, 3)), {k: v[:2] for k, v in kept.items()})
    with pytest.raises(DataError, match="id a is given twice"):
        index.add(["a", "a"], np.ones((2, 8)), {k: v[:2] for k, v in kept.items()})
    with pytest.raises(DataError, match="not finite"):
        index.add(["a"], np.full((1, 8), np.nan), {k: v[:1] for k, v in kept.items()})
    with pytest.raises(DataError, match="vector of a is zero"):
        index.add(["a"], np.zeros((1, 8)), {k: v[:1] for k, v in kept.items()})
    with pytest.raises(DataError, match="has the columns colour"):
        index.add(["a"], np.ones((1, 8)), {"colour": ["红"]})
    with pytest.raises(DataError, match="The item a: price is 'cheap', .* has the type float"):
        index.add(["a"], np.ones((1, 8)), {**{k: v[:1] for k, v in kept.items()}, "price": ["cheap"]})
    with pytest.raises(UsageError, match="Give the items"):
        index.delete()
    with pytest.raises(UsageError, match="exists already"):
        Index.create(tmp_path / "index", 8)
    with pytest.raises(UsageError, match="is not an index"):
        Index.open(tmp_path)
    with pytest.raises(UsageError, match="cannot be called"):
        Index.create(tmp_path / "other", 8, {"vector": "string"})
    with pytest.raises(UsageError, match="cannot have the type 'words'"):
        Index.create(tmp_path / "other", 8, {"name": "words"})
    with pytest.raises(UsageError, match="are too few for"):
        index.tune()
    assert len(index) == 40
    empty = Index.create(tmp_path / "empty", 3)
    assert empty.search(np.ones(3), 5) == [[]] and empty.search(np.ones(3), 5, where="id = 'x'") == [[]]
    quoted = index.delete(["it's", names[0]])
    assert (quoted.deleted, quoted.unknown) == ([names[0]], ["it's"]) and vectors.shape == (40, 8)
