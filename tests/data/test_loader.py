import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from openm6.core.errors import DataError, UsageError
from openm6.core.images import open_image
from openm6.data.loader import Entry, Loader
from openm6.data.rejects import Rejects
from openm6.data.source import Source, open_source
from openm6.data.store import ListRecords
from tests.data.conftest import NumberTask, number_example, number_slot, numbers, picture_bytes

Seen = list[tuple[str, int, int]]


def entry(name: str, count: int, weight: float = 1.0, start: int = 0, from_step: int = 0) -> Entry:
    return Entry(name, ListRecords(numbers(count, start)), NumberTask(), weight, start=from_step, encode=number_example)  # type: ignore[arg-type]


def loader(entries: list[Entry], batch_size: int = 8, **options: Any) -> Loader:
    return Loader(entries, None, batch_size, **{"threads": 0, "seed": 5, **options})  # type: ignore[arg-type]


def steps(source: Loader, count: int) -> list[Seen]:
    taken = []
    iterator = iter(source)
    for step in islice(iterator, count):
        taken.append([(s.origin, int(s.ids[0]), int(s.ids[1])) for s in step])
    iterator.close()  # type: ignore[attr-defined]
    return taken


class Counting:
    """Many records that take no room."""

    columns = ("text",)

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": str(index), "_where": f"#{index}"}


def picture_example(task: Any, record: Any, *rest: Any) -> Any:
    """Opens the record's picture before it takes its number."""
    open_image(record["photo"])
    return number_example(task, record, *rest)


def two() -> list[Entry]:
    return [entry("a", 37, 0.7), entry("b", 11, 0.3, start=1000)]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 20), st.integers(0, 3), st.integers(0, 2**31))
def test_a_run_goes_on_exactly_where_its_state_was_taken(before: int, threads: int, seed: int) -> None:
    whole = steps(loader(two(), seed=seed), before + 6)
    first = loader(two(), seed=seed, threads=threads)
    assert steps(first, before) == whole[:before]
    state = json.loads(json.dumps(first.get_state()))
    second = loader(two(), seed=seed, threads=threads)
    second.set_state(state)
    assert steps(second, 6) == whole[before:]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 2])
def test_the_global_order_is_the_same_for_every_number_of_processes(world: int, threads: int) -> None:
    alone = steps(loader(two()), 10)
    shares = [steps(loader(two(), rank=rank, world=world, threads=threads), 10) for rank in range(world)]
    for step in range(10):
        together = [shares[place % world][step][place // world] for place in range(8)]
        assert together == alone[step]


def test_a_run_may_go_on_with_another_number_of_processes() -> None:
    whole = steps(loader(two()), 12)
    first = loader(two(), rank=1, world=2)
    steps(first, 5)
    shares = []
    for rank in range(4):
        part = loader(two(), rank=rank, world=4)
        part.set_state(first.get_state())
        shares.append(steps(part, 7))
    assert [[shares[p % 4][s][p // 4] for p in range(8)] for s in range(7)] == whole[5:]


def test_every_epoch_holds_every_record_once_in_a_new_order_with_new_draws() -> None:
    seen = [s for step in steps(loader([entry("a", 24)]), 9) for s in step]
    epochs = [seen[i : i + 24] for i in range(0, 72, 24)]
    assert all(sorted(number for _, number, _ in epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(number for _, number, _ in epoch) for epoch in epochs}) == 3
    assert len({draw for _, _, draw in seen}) == 72


def test_seeds_give_different_orders() -> None:
    assert steps(loader(two(), seed=1), 3) != steps(loader(two(), seed=2), 3)


@pytest.mark.slow
def test_sources_too_large_for_a_written_order_are_shuffled_whole_too() -> None:
    large = [Entry("a", Counting(70_000), NumberTask(), encode=number_example)]  # type: ignore[arg-type]
    seen = [number for step in steps(loader(large, batch_size=100), 702) for _, number, _ in step]
    assert sorted(seen[:70_000]) == list(range(70_000))
    assert seen[70_000:] != seen[:200]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=4))
def test_sources_are_mixed_by_their_weights(weights: list[float]) -> None:
    entries = [entry(f"s{i}", 20 + i, weight) for i, weight in enumerate(weights)]
    counts = Counter(origin for step in steps(loader(entries), 100) for origin, _, _ in step)
    for i, weight in enumerate(weights):
        assert abs(counts[f"s{i}"] / 800 - weight / sum(weights)) < 0.02


def test_a_curriculum_starts_its_sources_at_their_steps_and_resumes_exactly() -> None:
    entries = [entry("a", 40), entry("b", 40, from_step=3), entry("c", 40, 2.0, from_step=5)]
    whole = steps(loader(entries), 12)
    assert [sorted({name for name, *_ in step}) for step in whole[:6]] == [["a"]] * 3 + [["a", "b"]] * 2 + [
        ["a", "b", "c"]
    ]
    for before in (2, 3, 4, 7):
        first = loader(entries)
        steps(first, before)
        second = loader(entries, world=2)
        second.set_state(first.get_state())
        other = loader(entries, world=2, rank=1)
        other.set_state(first.get_state())
        both = [sorted(a + b) for a, b in zip(steps(second, 3), steps(other, 3), strict=True)]
        assert both == [sorted(step) for step in whole[before : before + 3]]


def test_a_curriculum_needs_something_to_begin_with() -> None:
    with pytest.raises(UsageError, match="Nothing is trained before step 3"):
        loader([entry("a", 4, from_step=3)])


def test_no_process_is_given_one_source_alone() -> None:
    even = [entry("a", 50), entry("b", 50)]
    share = [origin for step in steps(loader(even, rank=0, world=2), 40) for origin, _, _ in step]
    assert 0.3 < share.count("a") / len(share) < 0.7


def test_a_bad_record_is_replaced_by_the_same_one_every_time_and_written_down(tmp_path: Path) -> None:
    def spoiled() -> list[Entry]:
        rows = numbers(30)
        rows[4]["text"] = rows[5]["text"] = "no number"
        return [Entry("a", ListRecords(rows), NumberTask(), encode=number_example)]  # type: ignore[arg-type, list-item]

    rejects = Rejects(tmp_path / "r.jsonl", max_fraction=0.2)
    seen = [s for step in steps(loader(spoiled(), rejects=rejects, batch_size=6), 5) for s in step]
    counts = Counter(number for _, number, _ in seen)
    assert counts == {**dict.fromkeys([i for i in range(30) if i not in (4, 5)], 1), 6: 3}
    again = Rejects(tmp_path / "again.jsonl", max_fraction=0.2)
    assert seen == [s for step in steps(loader(spoiled(), rejects=again, batch_size=6, threads=2), 5) for s in step]
    written = [json.loads(line)["where"] for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()]
    assert sorted(written) == ["list#4", "list#5"]


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_bad_records_stop_the_run(tmp_path: Path, threads: int) -> None:
    rows = numbers(200)
    for number in range(0, 200, 4):
        rows[number]["text"] = "no number"
    spoiled = [Entry("a", ListRecords(rows), NumberTask(), encode=number_example)]  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"has no number.*at most 5% may be"):
        steps(loader(spoiled, rejects=Rejects(tmp_path / "r.jsonl"), threads=threads), 30)


def test_a_source_without_any_usable_record_stops_the_run(tmp_path: Path) -> None:
    rows = [{"text": "none", "_where": f"list#{i}"} for i in range(5)]
    spoiled = [Entry("a", ListRecords(rows), NumberTask(), encode=number_example)]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="5 records in a row could not be used"):
        steps(loader(spoiled, rejects=Rejects(tmp_path / "r.jsonl")), 1)
    with pytest.raises(DataError, match=r"list#\d has no number"):
        steps(loader(spoiled), 1)


def test_missing_truncated_and_huge_pictures_are_skipped_and_named(tmp_path: Path) -> None:
    good = picture_bytes(7, "JPEG")
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (50_000, 1_200)).save(tmp_path / "huge.png")
    names = ["good.jpg"] * 40 + ["cut.jpg", "missing.jpg", "text.png", "huge.png"]
    (tmp_path / "a.csv").write_text("image,text\n" + "".join(f"{n},{i}\n" for i, n in enumerate(names)))
    rejects = Rejects(tmp_path / "r.jsonl", max_fraction=0.2)
    task = NumberTask(slots={s.name: s for s in (number_slot("photo", "image"), number_slot("text", "text"))})
    source = [Entry("a", open_source(tmp_path / "a.csv"), task, encode=picture_example)]  # type: ignore[arg-type]
    seen = {n for step in steps(loader(source, batch_size=11, rejects=rejects), 4) for _, n, _ in step}
    assert seen == set(range(40))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()]
    told = {line["where"].rpartition(":")[2]: line["reason"] for line in lines}
    assert set(told) == {"42", "43", "44", "45"}
    for line, word in (("42", "truncated"), ("43", "does not exist"), ("44", "no picture format"), ("45", "pixels")):
        assert word in told[line]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 3"):
        loader(two(), rank=0, world=3)
    with pytest.raises(UsageError, match="weight of a"):
        loader([entry("a", 3, 0.0)])
    with pytest.raises(DataError, match="a holds no records"):
        loader([Entry("a", ListRecords([]), NumberTask(), encode=number_example)])  # type: ignore[arg-type, list-item]
    with pytest.raises(UsageError, match="at least one source"):
        loader([])
    state = loader(two()).get_state()
    with pytest.raises(UsageError, match="data of this run has changed: sources"):
        loader([entry("a", 38, 0.7), entry("b", 11, 0.3)]).set_state(state)
    with pytest.raises(UsageError, match="batch_size that divides"):
        loader(two()).set_state({**state, "examples": 12})


def write_parquet(folder: Path, files: int = 5, rows: int = 60, group: int = 10) -> Path:
    folder.mkdir()
    for number in range(files):
        texts = [str(number * rows + i) for i in range(rows)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=group)
    return folder


def streamed(folder: Path) -> list[Entry]:
    return [
        Entry("p", open_source(folder, stream=True), NumberTask(), encode=number_example),
        entry("a", 13, start=1000),
    ]  # type: ignore[arg-type]


def test_streamed_parquet_resumes_exactly_and_keeps_its_order_over_processes(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "p")
    whole = steps(loader(streamed(folder)), 20)
    first = loader(streamed(folder), threads=2)
    assert steps(first, 9) == whole[:9]
    second = loader(streamed(folder), threads=2)
    second.set_state(first.get_state())
    assert steps(second, 11) == whole[9:]
    shares = [steps(loader(streamed(folder), rank=rank, world=2), 20) for rank in range(2)]
    assert [[shares[p % 2][s][p // 2] for p in range(8)] for s in range(20)] == whole


def test_an_epoch_of_streamed_parquet_holds_every_row_once_in_mixed_order(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "p"), stream=True)
    assert isinstance(source, Source)
    assert source.window == len(source) == 300
    seen = [
        n
        for step in steps(loader([Entry("p", source, NumberTask(), encode=number_example)], batch_size=10), 30)
        for _, n, _ in step
    ]  # type: ignore[arg-type]
    assert sorted(seen) == list(range(300))
    assert sum(abs(a - b) > 20 for a, b in pairwise(seen)) > 150


def test_streaming_keeps_only_the_row_groups_near_its_place(tmp_path: Path) -> None:
    from openm6.data import parquet

    rows = parquet.ParquetRows(str(write_parquet(tmp_path / "p", files=2, rows=500, group=10)))
    rows.window, rows._kept = 20, 6
    for index in range(len(rows)):
        rows[index]
        assert len(rows._tables) <= 6
