"""State that is written is on the disk before it takes the place of what was there, and its name too; of files of lines
that grow, what a kill leaves of the last line is cut."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.files import cut_torn_line, lock_output, sync, whole_lines, write_json, write_text, write_whole
from openm6.data.store import cached, write_records
from openm6.hub.jobs import Job, Jobs
from openm6.retrieve.memory import Lists
from openm6.serve.keys import Keys
from openm6.studio.review import write as write_page
from tests.conftest import tiny_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no folder tells what a number stands for")


def jobs(folder: Path) -> None:
    (folder / "j").mkdir()
    Jobs(folder)._write(Job("j", ("train",), str(folder)))


def lists(folder: Path) -> None:
    faiss = pytest.importorskip("faiss")
    flat = faiss.IndexFlatIP(4)
    index = faiss.IndexIVFFlat(flat, 4, 1, faiss.METRIC_INNER_PRODUCT)
    index.train(np.eye(4, dtype=np.float32))
    Lists(index, {"probes": 1, "stamp": "s"}).save(folder)


def cache(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENM6_CACHE", str(folder))
        cached("records", 1, lambda place: write_records(place, [{"text": "一"}]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: write_text(folder / "a", "一"),
    "JSON": lambda folder: write_json(folder / "a.json", {"a": 1}),
    "a folder": lambda folder: write_whole(folder / "a", tiny_model().config.save),
    "keys": lambda folder: Keys(folder / "keys.json").add("anna"),
    "a job": jobs,
    "a page of a review": lambda folder: write_page(folder / "page.html", ["a", "b"]),
    "lists of an index": lists,
    "records of the cache": cache,
}


def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise UsageError("This model has experts.")

    with pytest.raises(UsageError, match="has experts"):
        write_whole(tmp_path / "package", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_what_takes_a_place_is_on_the_disk_before_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    flushed: list[str] = []
    moved: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def seen_fsync(number: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def seen(move: Callable[..., None]) -> Callable[..., None]:
        def moving(source: Path, target: Path) -> None:
            inside = [str(p) for p in Path(source).rglob("*")] if Path(source).is_dir() else []
            assert {str(source), *inside} <= set(flushed)
            flushed.clear()
            moved.append(str(target))
            move(source, target)

        return moving

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen(replace))
    monkeypatch.setattr(os, "rename", seen(rename))
    WRITERS[name](tmp_path)
    assert moved and str(Path(moved[-1]).parent) in flushed


def test_a_line_that_counts_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{}\n")
        sync(file)
    assert sizes == [3]


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    Keys(tmp_path / "keys.json").add("anna")
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", torch.ones(1).tolist())
    before = (tmp_path / "a.json").read_text("utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": torch.ones(1)})

    def broken(draft: Path) -> None:
        draft.mkdir(exist_ok=True)
        (draft / "b").write_text("b", "utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="no space left"):
        write_whole(tmp_path / "b", broken)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text("utf-8") == before


LINES = '{"text": "一"}\n' + '{"text": "二\\u2028"}\n'


@pytest.mark.parametrize("left", range(len(LINES.encode()) + 1))
def test_a_file_torn_anywhere_keeps_its_whole_lines(tmp_path: Path, left: int) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(LINES.encode()[:left])
    whole = LINES.encode()[:left].count(b"\n")
    values = [{"text": "一"}, {"text": "二\u2028"}][:whole]
    assert list(whole_lines(file)) == values
    assert file.stat().st_size == left  # another process may be writing
    cut_torn_line(file)
    with file.open("a", encoding="utf-8") as more:
        more.write("3\n")
    assert list(whole_lines(file)) == [*values, 3]


def test_a_damaged_line_is_told_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert list(whole_lines(file)) == []
    cut_torn_line(file)
    assert not file.exists()
    for damaged in (b'{"text": \n', b"\xff\n", b"\x00\x00\n"):
        file.write_bytes(b"1\n" + damaged + b"3\n")
        with pytest.raises(DataError, match=r"lines\.jsonl:2 is damaged"):
            list(whole_lines(file))


HOLDER = """
import sys, time
from pathlib import Path
from openm6.core.files import lock_output
with lock_output(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_output_is_written_by_one_process_and_a_kill_frees_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        (tmp_path / "link").symlink_to(target.parent)
        for name in (target, tmp_path / "link" / "out"):
            with pytest.raises(UsageError, match="out is being written by another process"), lock_output(name):
                pass
        with lock_output(target.with_name("another")):
            pass
    finally:
        other.kill()
        other.wait()
    with lock_output(target):
        pass
    assert list(target.parent.iterdir()) == []
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(OpenM6Error, match="could not be written"), lock_output(tmp_path / "file" / "out"):
        pass
