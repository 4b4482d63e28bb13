import pytest
from hypothesis import given, strategies as st

from openm6.tasks.trie import Trie

END = 99
answers = st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=12)


@given(answers)
def test_walking_the_trie_spells_exactly_the_answers(wanted: list[list[int]]) -> None:
    trie = Trie(wanted, END)
    found, open_ends = [], [[]]
    while open_ends:
        prefix = open_ends.pop()
        for token in trie.next(prefix):
            if token == END:
                found.append(prefix)
            else:
                open_ends.append([*prefix, token])
    assert sorted(found) == sorted({tuple(a): a for a in wanted}.values())


@given(answers, st.lists(st.integers(-2, 6), max_size=6))
def test_next_is_what_some_answer_has_there(wanted: list[list[int]], prefix: list[int]) -> None:
    n = len(prefix)
    expected = {(a[n] if len(a) > n else END) for a in wanted if a[:n] == prefix}
    assert set(Trie(wanted, END).next(prefix)) == expected


def test_a_trie_without_answers_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Trie([], END)
