import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from openm6.core.errors import DataError, UsageError
from openm6.data.files import ATTEMPTS, expand, join, open_file, read_file
from openm6.data.readers import read


class FlakyFileSystem(MemoryFileSystem):
    """Keeps files in memory; every read of the first `failures` fails, half-way through the file."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 (fsspec's own way of sharing a store)
    pseudo_dirs = [""]  # noqa: RUF012
    failures = 0
    opened = 0

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode != "rb":
            return file
        type(self).opened += 1
        return _FlakyFile(file.getvalue(), type(self))


class _FlakyFile:
    def __init__(self, content: bytes, owner: type[FlakyFileSystem]):
        import io

        self._file, self._owner = io.BytesIO(content), owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if self._file.tell() > 0 and self._owner.failures > 0:
            self._owner.failures -= 1
            raise ConnectionResetError("the connection was reset")
        return self._file.read(min(size, 4096) if size > 0 else size)


@pytest.fixture
def flaky() -> Iterator[type[FlakyFileSystem]]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.clear_instance_cache()
    FlakyFileSystem.store, FlakyFileSystem.failures, FlakyFileSystem.opened = {}, 0, 0
    yield FlakyFileSystem
    FlakyFileSystem.store.clear()


def put(name: str, content: bytes) -> str:
    with fsspec.open(f"flaky://{name}", "wb") as file:
        file.write(content)
    return f"flaky://{name}"


@pytest.mark.slow
def test_a_read_that_breaks_off_goes_on_where_it_was(flaky: type[FlakyFileSystem]) -> None:
    content = b"".join(uuid.uuid4().bytes for _ in range(2000))
    url = put("/data/a.bin", content)
    flaky.failures = ATTEMPTS - 1
    assert read_file(url) == content
    assert flaky.opened == ATTEMPTS


@pytest.mark.slow
def test_after_three_attempts_it_is_a_data_error(flaky: type[FlakyFileSystem]) -> None:
    url = put("/data/a.bin", bytes(20000))
    flaky.failures = ATTEMPTS
    with pytest.raises(DataError, match="in 3 attempts"):
        read_file(url)


def test_a_missing_remote_file_is_not_tried_again(flaky: type[FlakyFileSystem]) -> None:
    with pytest.raises(DataError, match=r"flaky:///data/none\.jsonl cannot be read"):
        read_file("flaky:///data/none.jsonl")


def test_records_are_read_from_a_url_and_from_a_glob_of_urls(flaky: type[FlakyFileSystem]) -> None:
    put("/data/a.jsonl", b'{"text": "a"}\n' * 400)
    put("/data/b.jsonl", b'{"text": "b"}\n')
    flaky.failures = 1
    assert [r["text"] for r in read("flaky:///data/*.jsonl")] == ["a"] * 400 + ["b"]
    assert next(read("flaky:///data/b.jsonl"))["_root"] == "flaky:///data"


def test_relative_names_stay_below_a_remote_folder() -> None:
    assert join("s3://bucket/a/", "b/c.jpg") == "s3://bucket/a/b/c.jpg"
    for name in ("../c.jpg", "b/../../c.jpg", "/etc/passwd"):
        with pytest.raises(DataError, match="leads out"):
            join("s3://bucket/a", name)


def test_an_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="protocol"):
        open_file("nosuch://x/a.jsonl")


def test_a_missing_local_file_names_where_it_is_looked_for() -> None:
    with pytest.raises(DataError, match="it is looked for from"):
        expand("none/at/all.jsonl")
