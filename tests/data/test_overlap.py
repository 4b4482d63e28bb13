"""Records that agree."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, strategies as st

from openm6.data.columns import SlotView
from openm6.data.overlap import Twins, find_overlap
from openm6.data.source import Source
from openm6.data.store import ListRecords
from openm6.tasks.task import Task
from tests.data.conftest import picture_bytes

PAIR = Task.from_instruction("[text:a] [text:b] -> [label:c]")
rows = st.lists(st.tuples(*[st.sampled_from(["", "一", "一 ", "二", "１", "1"])] * 3), min_size=1, max_size=12)


def source(records: list[tuple[str, str, str]]) -> Source:
    return Source("s", ListRecords([dict(zip("abc", record, strict=True)) for record in records]))


def plain(text: str) -> str:
    return text.strip().replace("１", "1")


@given(rows, rows)
def test_overlap_is_by_what_is_given_alone(train: list, test: list) -> None:
    tested = source(test)
    found = find_overlap(PAIR, source(train), {}, tested, {})
    first = find_overlap(PAIR, source(train), {}, tested, {}, limit=1, most=1)
    same = [plain(text) for text in train[0][:2]] == [plain(text) for text in test[0][:2]]
    assert (len(first.found), first.total) == (int(same), 1)
    known = {(plain(a), plain(b)) for a, b, _ in train}
    assert found.found == {n for n, (a, b, _) in enumerate(test) if (plain(a), plain(b)) in known}
    assert found.total == len(test)


@given(rows)
def test_twins_are_counted_as_by_comparing_all_with_all(records: list) -> None:
    data = source(records)
    twins = Twins(PAIR, SlotView.of(PAIR, data))
    for number, record in enumerate(data):
        twins.add(number, record)
    told = [tuple(map(plain, record)) for record in records]
    answers: dict[tuple[str, str], set[str]] = {}
    for a, b, c in told:
        answers.setdefault((a, b), set()).add(c)
    found = twins.count()
    assert found["duplicates"]["count"] == len(told) - len(set(told))
    assert found["conflicts"]["count"] == sum(len(some) > 1 for some in answers.values())
    for name in ("duplicates", "conflicts"):
        if found[name]["count"]:
            first, second = (told[place] for place in found[name]["first"])
            assert first[:2] == second[:2] and (first == second) == (name == "duplicates")


def test_a_text_of_several_parts_is_not_another_of_other_parts() -> None:
    tested = source([("一二", "三", "")])
    assert find_overlap(PAIR, source([("一", "二三", "")]), {}, tested, {}).found == set()


def test_pictures_in_records_agree_with_those_in_files(tmp_path: Path) -> None:
    task = Task.from_instruction("[image:p] -> [label:c]")
    (tmp_path / "a.png").write_bytes(picture_bytes(1))
    train = Source("t", ListRecords([{"p": "a.png", "c": "x", "_root": str(tmp_path)}, {"p": "gone.png", "c": "x"}]))
    numbers = list(range(5))
    random.Random(0).shuffle(numbers)
    tested = Source("s", ListRecords([{"p": picture_bytes(n), "c": "y"} for n in numbers]))
    found = find_overlap(task, train, {}, tested, {})
    assert found == ({numbers.index(1)}, 5, str(numbers.index(1)))


def test_a_task_without_inputs_is_compared_by_its_outputs() -> None:
    task = Task.from_instruction("-> [text:a]")
    train, test = source([("一", "", ""), ("二", "", "")]), source([("二 ", "", ""), ("三", "", "")])
    assert find_overlap(task, train, {}, test, {}).found == {0}
