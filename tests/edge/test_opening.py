"""An edge device starts without a usable store, too, unless its privacy is at stake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openm6.core.errors import UsageError
from openm6.edge.answer_store import AnswerStore, StoreError, new_key
from openm6.edge.device import Settings
from openm6.edge.opening import open_answer_store, open_store, store_summary
from tests.conftest import full_disk


def _filled(folder: Path, settings: Settings, count: int = 20) -> None:
    kept = open_answer_store(folder, settings)
    for number in range(count):
        kept.keep("vqa", {"question": f"{number}" * 500}, "红色", "蓝色")
    kept.close()


def _damage(file: Path, start: int = 4096) -> bytes:
    """Overwrite all but the first page, or all."""
    content = file.read_bytes()[:start] + os.urandom(max(8192, file.stat().st_size - start))
    file.write_bytes(content)
    return content


def _works(kept: AnswerStore) -> bool:
    kept.keep("vqa", {"question": "x"}, "红色", "蓝色")
    return len(list(kept.rows())) == 1


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "kept.sqlite"
    contents = {}
    for number in (1, 2):
        _filled(tmp_path, Settings())
        contents[f"kept.sqlite.damaged-{number}"] = _damage(file, 0 if number == 1 else 4096)
        kept = open_store(tmp_path, Settings())
        assert _works(kept) and store_summary(tmp_path, kept)["set_aside"] == list(contents)
        assert not kept.trouble
        kept.close()
        file.unlink()
    for name, content in contents.items():
        assert (tmp_path / name).read_bytes() == content and (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("before", "after", "starts"),
    [
        ({}, {}, True), ({"privacy": "features"}, {}, True), ({"privacy": "features"}, {"privacy": "features"}, True),
        ({"privacy": "nothing"}, {"privacy": "features"}, True), ({"encrypt": "K"}, {"encrypt": "K"}, True),
        ({}, {"privacy": "features"}, False), ({}, {"privacy": "nothing"}, False), ({}, {"encrypt": "K"}, False),
        ({"privacy": "features"}, {"privacy": "features", "encrypt": "K"}, False),
        ({"encrypt": "K"}, {"encrypt": "K", "privacy": "features"}, False),
    ],
)  # fmt: skip
def test_where_a_damaged_file_may_hold_what_is_forbidden_the_device_refuses(
    before: dict[str, str], after: dict[str, str], starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("K", new_key())
    _filled(tmp_path, Settings(**before))
    content = _damage(tmp_path / "kept.sqlite")
    if starts:
        open_store(tmp_path, Settings(**after)).close()
        assert (tmp_path / "kept.sqlite.damaged-1").read_bytes() == content
        return
    with pytest.raises(StoreError, match="delete the file"):
        open_store(tmp_path, Settings(**after))
    assert (tmp_path / "kept.sqlite").read_bytes() == content
    # Nor does it forget a file that was set aside under laxer settings.
    open_store(tmp_path, Settings(**before)).close()
    with pytest.raises(StoreError, match="damaged-1 is damaged"):
        open_store(tmp_path, Settings(**after))


def test_of_a_file_without_a_header_nothing_is_known(tmp_path: Path) -> None:
    _filled(tmp_path, Settings(privacy="features"))
    _damage(tmp_path / "kept.sqlite", 0)
    with pytest.raises(StoreError, match="privacy = features forbids on the disk"):
        open_store(tmp_path, Settings(privacy="features"))


def test_without_a_place_for_it_nothing_is_kept(tmp_path: Path) -> None:
    for settings in (Settings(), Settings(privacy="features"), Settings(privacy="nothing")):
        kept = open_store(tmp_path / "nowhere", settings)
        assert "Nothing is stored: " in kept.trouble and "kept.sqlite cannot be opened" in kept.trouble
        assert kept.keep("vqa", {"question": "x"}, "红色", "蓝色") == 0 and not list(kept.rows())
        assert store_summary(tmp_path / "nowhere", kept)["trouble"] == kept.trouble
        kept.spend(7)
        assert kept.spent(7) == 1 and kept.trouble
        kept.close()


def test_on_a_full_disk_a_new_device_keeps_nothing(tmp_path: Path) -> None:
    with full_disk():
        kept = open_store(tmp_path, Settings())
    assert "cannot be used" in kept.trouble and kept.file is None
    kept.close()
    kept = open_store(tmp_path, Settings())  # there is room again
    assert _works(kept)
    kept.close()


def test_on_a_full_disk_what_was_kept_is_read_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    _filled(tmp_path, Settings())
    with full_disk():
        kept = open_store(tmp_path, Settings())
        assert "cannot be written" in kept.trouble and kept.counts() == {"vqa": 20}
        with pytest.raises(StoreError):
            kept.keep("vqa", {"question": "x"}, "红色", "蓝色")
        assert "cannot be written" in store_summary(tmp_path, kept)["trouble"]
    kept.keep("vqa", {"question": "x"}, "红色", "蓝色")
    assert kept.counts() == {"vqa": 21} and not store_summary(tmp_path, kept)["trouble"]
    kept.close()


def test_what_cannot_be_deleted_or_encrypted_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("K", new_key())
    _filled(tmp_path, Settings())
    for stricter in (Settings(privacy="nothing"), Settings(privacy="features"), Settings(encrypt="K")):
        with full_disk(), pytest.raises(StoreError, match="forbids on the disk"):
            open_store(tmp_path, stricter)
    kept = open_answer_store(tmp_path, Settings())
    assert kept.counts() == {"vqa": 20}
    kept.close()


def test_encryption_that_cannot_be_had_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K", raising=False)
    with pytest.raises(UsageError, match=r"\$K, which is not set"):
        open_store(tmp_path, Settings(encrypt="K"))
    assert not list(tmp_path.iterdir())
    open_store(tmp_path, Settings(encrypt="K", privacy="nothing")).close()  # there is nothing to encrypt
