"""What the cloud answered is kept within a size and a privacy mode, encrypted if that is asked for."""

from __future__ import annotations

import base64
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from openm6.edge.box import Settings
from openm6.edge.kept import ALL, FEATURES, NOTHING, Kept, is_held_out, new_key, open_kept
from openm6.errors import OpenM6Error, UsageError

PICTURE = bytes(range(256)) * 8


def _everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def _found(folder: Path) -> bool:
    """Whether the picture, or its base64, lies in any file, deleted or not."""
    content = _everything(folder)
    return PICTURE[:300] in content or base64.b64encode(PICTURE)[:300] in content


def _keep(kept: Kept, count: int = 1, start: int = 0) -> None:
    for number in range(start, start + count):
        kept.keep("vqa", {"photo": PICTURE, "question": f"问题{number}", "_where": "x"}, "红色", "蓝色")


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "k", ALL, 10**6)
    _keep(kept, 3)
    kept.keep("caption", {"photo": {"features": b"12", "rows": 1, "columns": 1, "eyes": "e"}}, {"a": 1}, None)
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
    kept = Kept(tmp_path / "k", ALL, 20_000)
    _keep(kept, 30)
    rows = list(kept.rows())
    assert rows[-1]["record"]["question"] == "问题29" and 3 < len(rows) < 8
    assert kept.size() <= 20_000
    kept.close()
    assert (tmp_path / "k").stat().st_size < 60_000


def test_a_stricter_mode_deletes_what_it_forbids(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "k", ALL, 10**6)
    _keep(kept, 5)
    kept.close()
    assert _found(tmp_path)
    kept = Kept(tmp_path / "k", FEATURES, 10**6)
    assert list(kept.rows()) == []
    assert not _found(tmp_path)
    kept.keep("vqa", {"photo": {"features": b"f" * 64, "rows": 1, "columns": 1}}, "红色", None)
    kept.saw("vqa", "0001", np.ones(4), 1.0, 1.0, 10)
    kept.close()
    kept = Kept(tmp_path / "k", NOTHING, 10**6)
    assert list(kept.rows()) == [] and kept.seen("vqa", "0001") == []
    _keep(kept)
    kept.saw("vqa", "0001", np.ones(4), 1.0, 1.0, 10)
    assert list(kept.rows()) == [] and kept.seen("vqa", "0001") == []
    kept.close()
    assert not _found(tmp_path) and base64.b64encode(b"f" * 60) not in _everything(tmp_path)


def test_encrypted_nothing_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    kept = Kept(tmp_path / "k", ALL, 10**6)
    _keep(kept, 2)
    kept.close()
    assert _found(tmp_path)
    key = new_key()
    kept = Kept(tmp_path / "k", ALL, 10**6, key)  # what was there is hidden now
    _keep(kept, 2, 2)
    assert [row["record"]["question"] for row in kept.rows()] == [f"问题{n}" for n in range(4)]
    kept.close()
    assert not _found(tmp_path) and "问题".encode() not in _everything(tmp_path)
    with pytest.raises(UsageError, match="another key"):
        Kept(tmp_path / "k", ALL, 10**6, new_key())
    with pytest.raises(UsageError, match="new-key"):
        Kept(tmp_path / "k", ALL, 10**6, "short")
    kept = Kept(tmp_path / "k", ALL, 10**6)
    with pytest.raises(UsageError, match="encrypted"):
        list(kept.rows())
    kept.close()


def test_a_box_says_which_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.delenv("BOX_KEY", raising=False)
    settings = Settings(encrypt="BOX_KEY")
    with pytest.raises(UsageError, match="BOX_KEY"):
        open_kept(tmp_path, settings)
    monkeypatch.setenv("BOX_KEY", new_key())
    open_kept(tmp_path, settings).close()


def test_numbers_are_remembered(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "k", ALL, 10**6)
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
    with pytest.raises(OpenM6Error, match="cannot be opened"):
        Kept(tmp_path / "k", ALL, 10**6)
    with sqlite3.connect(tmp_path / "other"):
        pass
