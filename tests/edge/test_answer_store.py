"""The cloud's answers are stored within a size and a privacy mode, encrypted on request."""

from __future__ import annotations

import base64
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openm6.core.errors import UsageError
from openm6.edge.answer_store import AnswerStore, InterruptedWriteError, StoreError, is_held_out, new_key
from openm6.edge.device import ALL, FEATURES, NOTHING, Settings
from openm6.edge.opening import open_answer_store
from tests.conftest import full_disk
from tests.edge.conftest import interrupt_write

PICTURE = bytes(range(256)) * 8


def _everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def _found(folder: Path) -> bool:
    """True if the picture, or its base64, is in any file, deleted or not."""
    content = _everything(folder)
    return PICTURE[:300] in content or base64.b64encode(PICTURE)[:300] in content


def _keep(kept: AnswerStore, count: int = 1, start: int = 0) -> None:
    for number in range(start, start + count):
        kept.keep("vqa", {"photo": PICTURE, "question": f"问题{number}", "_where": "x"}, "红色", "蓝色")


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    kept = AnswerStore(tmp_path / "k", ALL, 10**6)
    _keep(kept, 3)
    kept.keep("caption", {"photo": {"features": b"12", "rows": 1, "columns": 1, "image_encoder": "e"}}, {"a": 1}, None)
    rows = list(kept.rows("vqa"))
    assert [row["id"] for row in rows] == [1, 2, 3]
    assert rows[0] == {"id": 1, "task": "vqa", "record": {"photo": PICTURE, "question": "问题0"}, "value": "红色",
                       "edge": "蓝色"}  # fmt: skip
    assert len(list(kept.rows("vqa", until=2))) == 2
    assert next(kept.rows("caption"))["record"]["photo"]["features"] == b"12"
    assert kept.tasks() == {"vqa": (3, 3), "caption": (1, 4)}
    assert kept.size() > 3 * len(PICTURE)
    kept.close()


def test_the_oldest_goes_when_it_is_full(tmp_path: Path) -> None:
    kept = AnswerStore(tmp_path / "k", ALL, 20_000)
    _keep(kept, 30)
    rows = list(kept.rows())
    assert rows[-1]["record"]["question"] == "问题29" and 3 < len(rows) < 8
    assert kept.size() <= 20_000
    kept.close()
    assert (tmp_path / "k").stat().st_size < 60_000


def test_a_stricter_mode_deletes_what_it_forbids(tmp_path: Path) -> None:
    kept = AnswerStore(tmp_path / "k", ALL, 10**6)
    _keep(kept, 5)
    kept.close()
    assert _found(tmp_path)
    kept = AnswerStore(tmp_path / "k", FEATURES, 10**6)
    assert list(kept.rows()) == []
    assert not _found(tmp_path)
    kept.keep("vqa", {"photo": {"features": b"f" * 64, "rows": 1, "columns": 1}}, "红色", None)
    kept.saw("vqa", "0001", np.ones(4), 1.0, 1.0, 10)
    kept.close()
    kept = AnswerStore(tmp_path / "k", NOTHING, 10**6)
    assert list(kept.rows()) == [] and kept.seen("vqa", "0001") == []
    _keep(kept)
    kept.saw("vqa", "0001", np.ones(4), 1.0, 1.0, 10)
    assert list(kept.rows()) == [] and kept.seen("vqa", "0001") == []
    kept.close()
    assert not _found(tmp_path) and base64.b64encode(b"f" * 60) not in _everything(tmp_path)


def test_encrypted_nothing_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    kept = AnswerStore(tmp_path / "k", ALL, 10**6)
    _keep(kept, 2)
    kept.close()
    assert _found(tmp_path)
    key = new_key()
    kept = AnswerStore(tmp_path / "k", ALL, 10**6, key)  # what was there is hidden now
    _keep(kept, 2, 2)
    assert [row["record"]["question"] for row in kept.rows()] == [f"问题{n}" for n in range(4)]
    kept.close()
    assert not _found(tmp_path) and "问题".encode() not in _everything(tmp_path)
    with pytest.raises(UsageError, match="new-key"):
        AnswerStore(tmp_path / "k", ALL, 10**6, "short")


def test_a_device_says_which_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.delenv("DEVICE_KEY", raising=False)
    settings = Settings(encrypt="DEVICE_KEY")
    with pytest.raises(UsageError, match="DEVICE_KEY"):
        open_answer_store(tmp_path, settings)
    monkeypatch.setenv("DEVICE_KEY", new_key())
    open_answer_store(tmp_path, settings).close()


def test_numbers_are_remembered(tmp_path: Path) -> None:
    kept = AnswerStore(tmp_path / "k", ALL, 10**6)
    for number in range(5):
        kept.saw("vqa", "0001", np.full(3, number), 1.0, 2.0, 3)
    seen = kept.seen("vqa", "0001")
    assert [one[0].tolist() for one in seen] == [[n] * 3 for n in (2, 3, 4)] and seen[0][1:] == (1.0, 2.0)
    kept.saw("vqa", "0002", np.zeros(3), 0.0, 1.0, 3)
    assert kept.seen("vqa", "0001") == [] and len(kept.seen("vqa", "0002")) == 1
    for _ in range(3):
        kept.spend(7)
    assert kept.spent(7) == 3 and kept.spent(8) == 0
    kept.spend(8)
    assert kept.spent(7) == 0
    kept.close()


def test_what_was_asked_is_on_one_side(tmp_path: Path) -> None:
    rows = [{"record": {"photo": PICTURE, "question": str(n)}} for n in range(400)]
    sides = [is_held_out(row) for row in rows]
    assert sides == [is_held_out({**row, "id": 5, "value": "x"}) for row in rows]
    assert 40 < sum(sides) < 130


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(os.urandom(5000))
    with pytest.raises(StoreError, match="not a database") as found:
        AnswerStore(tmp_path / "k", ALL, 10**6)
    assert found.value.is_damaged
    kept = AnswerStore(tmp_path / "pages", ALL, 10**6)
    _keep(kept, 30)
    kept.close()
    content = bytearray((tmp_path / "pages").read_bytes())
    content[8192:16384] = bytes(8192)  # two pages: the start alone does not tell
    (tmp_path / "pages").write_bytes(content)
    with pytest.raises(StoreError) as found:
        AnswerStore(tmp_path / "pages", ALL, 10**6)
    assert found.value.is_damaged


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kept = AnswerStore(tmp_path / "k", ALL, 10**6)
        assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
        _keep(kept)
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}  # with the journal
        kept.close()
        for file in tmp_path.iterdir():  # as earlier versions left it
            file.chmod(0o644)
        kept = AnswerStore(tmp_path / "k", ALL, 10**6)
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
        assert len(list(kept.rows())) == 1
        kept.close()
    finally:
        os.umask(before)


def test_encryption_costs_no_answer(tmp_path: Path) -> None:
    """A store that is full stays as full when a key is named, and when one more comes, one goes."""
    pytest.importorskip("cryptography")
    kept = AnswerStore(tmp_path / "k", ALL, 20_000)
    _keep(kept, 30)
    before = list(kept.rows())
    kept.close()
    kept = AnswerStore(tmp_path / "k", ALL, 20_000, new_key())
    assert list(kept.rows()) == before
    assert kept.keep("vqa", before[0]["record"], "红色", "蓝色") == 1
    assert len(list(kept.rows())) == len(before)
    kept.close()


@pytest.mark.parametrize("end", ["killed", "full"])
def test_encryption_that_is_interrupted_loses_nothing(end: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    kept = AnswerStore(tmp_path / "k", ALL, 10**7)
    _keep(kept, 200)
    before = list(kept.rows())
    kept.close()
    key, size = new_key(), (tmp_path / "k").stat().st_size
    if end == "killed":
        code = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from openm6.edge.answer_store import AnswerStore, Cipher\n"
            "encrypt, times = Cipher.encrypt, iter(range(150))\n"
            "def act(self, body):\n"
            "    return os.kill(os.getpid(), signal.SIGKILL) if next(times, None) is None else encrypt(self, body)\n"
            "Cipher.encrypt = act\n"
            "AnswerStore(Path(sys.argv[1]), 'all', 10**7, sys.argv[2])\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "k"), key])
        assert done.returncode == -signal.SIGKILL
    else:
        with full_disk(size // 2), pytest.raises(StoreError, match="cannot be used"):  # no room for the journal
            AnswerStore(tmp_path / "k", ALL, 10**7, key)
    kept = AnswerStore(tmp_path / "k", ALL, 10**7)
    assert list(kept.rows()) == before
    kept.close()
    kept = AnswerStore(tmp_path / "k", ALL, 10**7, key)
    assert list(kept.rows()) == before
    kept.close()
    assert not _found(tmp_path)


def test_another_key_or_none_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = new_key()
    kept = AnswerStore(tmp_path / "k", ALL, 10**6, key)
    _keep(kept, 2)
    kept.close()
    before = (tmp_path / "k").read_bytes()
    with pytest.raises(UsageError, match="2 encrypted answers, and their key is another one"):
        AnswerStore(tmp_path / "k", ALL, 10**6, new_key())
    with pytest.raises(UsageError, match=f"{tmp_path}/k has 2 encrypted answers, and no key is named"):
        AnswerStore(tmp_path / "k", ALL, 10**6)
    assert (tmp_path / "k").read_bytes() == before
    kept = AnswerStore(tmp_path / "k", ALL, 10**6, key)
    assert len(list(kept.rows())) == 2
    kept.close()
    kept = AnswerStore(tmp_path / "k", NOTHING, 10**6)  # what is to be deleted has not to be read
    assert kept.counts() == {}
    kept.close()


def test_an_answer_that_is_too_large_takes_no_other_ones_place(tmp_path: Path) -> None:
    kept = AnswerStore(tmp_path / "k", ALL, 20_000)
    _keep(kept, 3)
    with pytest.raises(StoreError, match=r"larger than all that may be kept \(20,000\)"):
        kept.keep("vqa", {"photo": bytes(20_000)}, "红色", None)
    assert len(list(kept.rows())) == 3
    kept.close()


def test_a_damaged_answer_is_passed_over(tmp_path: Path) -> None:
    kept = AnswerStore(tmp_path / "k", ALL, 10**6)
    _keep(kept, 3)
    with sqlite3.connect(tmp_path / "k") as other:
        other.execute("UPDATE answers SET body = ? WHERE id = 2", (b"{",))
    assert [row["id"] for row in kept.rows()] == [1, 3]
    kept.close()


def test_a_write_that_has_just_begun_is_not_taken_for_an_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = open_answer_store(tmp_path, Settings())
    _keep(kept, 9)
    kept.close()
    before = (tmp_path / "kept.sqlite").read_bytes()
    interrupt_write(tmp_path / "kept.sqlite")
    with pytest.raises(InterruptedWriteError, match=r"A write to .*kept\.sqlite was interrupted"):
        open_answer_store(tmp_path, Settings(), read_only=True)

    def finish_write(seconds: float) -> None:
        (tmp_path / "kept.sqlite").write_bytes(before)
        (tmp_path / "kept.sqlite-journal").unlink()

    monkeypatch.setattr("openm6.edge.answer_store.time.sleep", finish_write)
    kept = open_answer_store(tmp_path, Settings(), read_only=True)
    assert kept.counts() == {"vqa": 9}
    kept.close()


def test_opened_to_be_read_it_stays_as_it_is(tmp_path: Path) -> None:
    kept = open_answer_store(tmp_path, Settings())
    _keep(kept, 3)
    kept.close()
    before = (tmp_path / "kept.sqlite").read_bytes()
    kept = open_answer_store(tmp_path, Settings(privacy="features"), read_only=True)
    assert kept.counts() == {"vqa": 3} and kept.pending() == (3, 0)
    with pytest.raises(StoreError, match="cannot be used"):
        _keep(kept)
    kept.close()
    assert (tmp_path / "kept.sqlite").read_bytes() == before
    (tmp_path / "other").mkdir()
    kept = open_answer_store(tmp_path / "other", Settings(), read_only=True)
    assert kept.counts() == {} and kept.pending() == (0, 0)
    kept.close()
    assert not list((tmp_path / "other").iterdir())
