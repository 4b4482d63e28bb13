"""`openm6 keys list`: who may spend how much, and has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from openm6.core.errors import UsageError
from openm6.serve.keys import Keys
from openm6.serve.meter import Meter
from tests.conftest import command


def test_the_list_tells_what_was_spent_today_and_what_is_left(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.add("shop", per_minute=60, per_day=1000)
    keys.add("anna", "manage")
    told = json.loads(command("keys", "list", "--json", "--keys", keys.path).stdout)
    assert [(one["spent_today"], one["left_today"]) for one in told] == [(0, 1000), (0, None)]
    assert not keys.spent.exists()  # to look leaves nothing behind
    meter = Meter(keys.spent)
    for key, tokens in zip(keys.list(), (1200, 7), strict=True):
        meter.spend(key, tokens)
    told = json.loads(command("keys", "list", "--json", "--keys", keys.path).stdout)
    assert [(one["name"], one["spent_today"], one["left_today"]) for one in told] == [
        ("shop", 1200, 0), ("anna", 7, None)
    ]  # fmt: skip
    table = command("keys", "list", "--keys", keys.path).stdout
    assert "1200" in table and "1000" in table and "anna" in table


def test_a_damaged_count_is_told(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.add("shop")
    keys.spent.write_text("{}")
    with pytest.raises(UsageError, match=r"keys.json.spent is damaged: remove it"):
        command("keys", "list", "--keys", keys.path)


def test_a_key_that_was_taken_away_is_none_at_once(tmp_path: Path) -> None:
    """Though a server reads the file anew only when it has changed, and both changes have the same time."""
    keys, server = Keys(tmp_path / "keys.json"), Keys(tmp_path / "keys.json")
    first, second = keys.add("anna"), keys.add("otto")
    os.utime(keys.path, (1000, 1000))
    assert server.find(first) and server.find(second)
    keys.remove("anna")
    os.utime(keys.path, (1000, 1000))
    assert server.find(first) is None and server.find(second)
