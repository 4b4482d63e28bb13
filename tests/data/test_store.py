from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import DataError
from openm6.data.store import ComputedRecords, StoredRecords, cached, iterate, write_records

plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text()
values = plain | st.binary(max_size=40) | st.lists(plain | st.binary(max_size=9), max_size=3)
records = st.lists(
    st.dictionaries(st.text(max_size=8).filter(lambda k: k != "_where"), values, max_size=5), max_size=20
)


@given(records)
def test_records_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, given_records: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("store")
    assert write_records(folder, given_records) == len(given_records)
    back = StoredRecords(folder)
    assert list(iterate(back)) == given_records
    assert set(back.columns) == {key for record in given_records for key in record}


def test_any_record_is_found_over_many_batches(tmp_path: Path) -> None:
    write_records(tmp_path, ({"number": i, "raw": bytes([i % 251])} for i in range(5000)))
    back = StoredRecords(tmp_path)
    order = np.random.default_rng(0).permutation(5000)
    assert [back[int(i)]["number"] for i in order] == order.tolist()
    assert back[-1] == {"number": 4999, "raw": bytes([4999 % 251])}
    assert back.blob(4998) == bytes([4998 % 251])
    with pytest.raises(IndexError):
        back[5000]


def test_numpy_values_become_numbers(tmp_path: Path) -> None:
    write_records(tmp_path, [{"a": np.float32(0.5), "b": np.arange(3)}])
    assert StoredRecords(tmp_path)[0] == {"a": 0.5, "b": [0, 1, 2]}


def test_a_damaged_store_is_a_data_error(tmp_path: Path) -> None:
    write_records(tmp_path, [{"a": 1, "b": b"raw"}])
    records, ends = tmp_path / "records.bin", tmp_path / "ends.npy"
    for file, content in (
        (records, records.read_bytes()[:-1]),
        (records, None),
        (ends, b"no array"),
        (ends, b""),
        (ends, None),
    ):
        whole = file.read_bytes()
        file.write_bytes(content) if content is not None else file.unlink()
        with pytest.raises(DataError, match="damaged"):
            StoredRecords(tmp_path)
        file.write_bytes(whole)
    assert StoredRecords(tmp_path)[0] == {"a": 1, "b": b"raw"}


def test_a_store_may_be_empty(tmp_path: Path) -> None:
    assert write_records(tmp_path, []) == 0
    assert list(iterate(StoredRecords(tmp_path))) == []


def test_computed_records_end() -> None:
    records = ComputedRecords(3, ("number",), lambda number: {"number": number})
    assert list(iterate(records)) == [{"number": 0}, {"number": 1}, {"number": 2}] and records[-1] == {"number": 2}
    with pytest.raises(IndexError):
        records[3]


def test_what_fails_half_way_leaves_nothing_in_the_cache(cache: Path) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        cached("test", 1, make)
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_several_askers_at_once_make_it_once() -> None:
    made = []

    def make(folder: Path) -> None:
        folder.mkdir()
        made.append(folder)

    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: cached("test", 2, make), range(8)))
    assert len(made) == len(places) == 1
