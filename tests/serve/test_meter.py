"""What keys spend: counted once, kept, shared by several servers, and told when it is too much."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.serve.keys import Key
from openm6.serve.meter import Charge, Meter

SHOP = Key("shop", "", per_minute=2, per_day=100)


def test_what_is_spent_survives_the_death_of_the_server(tmp_path: Path) -> None:
    """In a loop, as the server spends: what came in one turn of it is written by the next."""
    code = (
        "import asyncio, os, signal, sys; from pathlib import Path\n"
        "from openm6.serve.keys import Key; from openm6.serve.meter import Meter\n"
        "async def main():\n"
        "    meter = Meter(Path(sys.argv[1]))\n"
        "    for _ in range(10):\n"
        "        for _ in range(10): meter.spend(Key('shop', ''), 7)\n"
        "        await asyncio.sleep(0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "spent")], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert Meter(tmp_path / "spent").spent(SHOP) == 700


def test_servers_with_one_file_add_up(tmp_path: Path) -> None:
    one, other = Meter(tmp_path / "spent"), Meter(tmp_path / "spent")
    one.spend(SHOP, 30)
    other.spend(SHOP, 12)
    one.spend(Key("anna", ""), 5)
    assert one.spent(SHOP) == other.spent(SHOP) == 42
    assert (tmp_path / "spent").stat().st_mode & 0o077 == 0  # who asks how much is nobody else's affair
    one.count(SHOP)
    other.count(SHOP)
    with pytest.raises(Refusal, match="2 requests within a minute"):
        one.count(SHOP)


def test_a_new_day_begins_at_midnight_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, day = Meter(tmp_path / "spent"), 20_000 * 86_400
    monkeypatch.setattr(time, "time", lambda: day - 1.0)
    meter.spend(SHOP, 100)
    with pytest.raises(Refusal) as beyond:
        meter.check(SHOP)
    assert (beyond.value.kind, beyond.value.retry_after) == (ErrorKind.TOKEN_LIMIT, 1)
    message, until = str(beyond.value), "2024-10-04 00:00:00 UTC"
    assert "spent 100 tokens today" in message and "100 a day" in message and until in message
    monkeypatch.setattr(time, "time", lambda: day + 1.0)
    assert meter.spent(SHOP) == 0
    meter.check(SHOP)


def test_the_refusal_says_which_limit_and_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    for second in (1_000_000_000, 1_000_000_030):
        monkeypatch.setattr(time, "time", lambda now=second: now)
        meter.count(SHOP)
    monkeypatch.setattr(time, "time", lambda: 1_000_000_045)
    with pytest.raises(Refusal, match="2 requests within a minute.*2001-09-09 01:47:40 UTC") as beyond:
        meter.count(SHOP)
    assert (beyond.value.kind, beyond.value.retry_after) == (ErrorKind.REQUEST_LIMIT, 15)
    assert meter.headers(SHOP) == {
        "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "15s",
        "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "22h12m35s",
    }  # fmt: skip
    monkeypatch.setattr(time, "time", lambda: 1_000_000_061)
    meter.count(SHOP)
    assert Meter().headers(Key("free", "")) == {}


@pytest.mark.parametrize("content", [b'{"shop": [20000, 5]}', b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spent").write_bytes(content)
    with pytest.raises(UsageError, match="spent is damaged: remove it"):
        Meter(tmp_path / "spent")


def test_where_nothing_can_be_written_it_is_counted_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        meter = Meter(tmp_path / "nowhere" / "spent")
    assert "in memory alone" in caplog.text
    meter.spend(SHOP, 8)
    assert meter.spent(SHOP) == 8


@pytest.mark.slow
def test_what_cannot_be_written_for_a_while_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    meter, other = Meter(tmp_path / "spent"), Meter(tmp_path / "spent")
    blocker = sqlite3.connect(tmp_path / "spent", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # as a full disk would, it stops whoever writes
    with caplog.at_level(logging.WARNING):
        meter.spend(SHOP, 8)
        meter.spend(SHOP, 8)
    assert caplog.text.count("cannot be written for now") == 1 and meter.spent(SHOP) == 16
    blocker.close()
    meter.spend(SHOP, 1)
    assert meter.spent(SHOP) == other.spent(SHOP) == 17


@given(
    strategies.lists(strategies.tuples(strategies.integers(0, 60), strategies.integers(0, 60)), max_size=40),
    strategies.randoms(use_true_random=False),
)
def test_a_key_overdraws_by_one_request_at_most(asked: list[tuple[int, int]], chance: object) -> None:
    """Whatever runs at the same time, and however it ends."""
    meter, running = Meter(), []
    for first, second in asked:
        most, real = max(first, second), min(first, second)
        if meter.spent(SHOP) < SHOP.per_day and meter.reserve(SHOP, most):
            running.append((Charge(meter, SHOP).request(most), real))
        if running and chance.random() < 0.3:  # type: ignore[attr-defined]
            cost, tokens = running.pop(chance.randrange(len(running)))  # type: ignore[attr-defined]
            cost.hear({})
            cost.hear({"tokens": tokens, "prompt_tokens": 0, "value": ""})
            cost.leave()
    for cost, tokens in running:
        cost.hear({"tokens": tokens, "prompt_tokens": 0, "error": "cancelled"})
        cost.leave()
    assert meter.spent(SHOP) <= 99 + 60
    assert meter.reserved(SHOP) == 0


def test_choices_pay_their_prompt_once() -> None:
    meter = Meter()
    charge = Charge(meter, SHOP)
    costs = [charge.request(0) for _ in range(3)]
    for number, cost in enumerate(costs):
        cost.hear({"prompt_tokens": 10, "tokens": 1})
        cost.hear({"prompt_tokens": 10, "tokens": 5 + number, "value": ""})
    assert (charge.prompt_tokens, charge.tokens) == (10, 18) and meter.spent(SHOP) == 28


def test_what_two_processes_worked_at_is_charged_once() -> None:
    meter = Meter()
    cost = Charge(meter, SHOP).request(50)
    for message in (
        {}, {"prompt_tokens": 10, "tokens": 7}, {"error": "died"}, {}, {"prompt_tokens": 10, "tokens": 1},
        {"prompt_tokens": 10, "tokens": 9, "value": ""},
    ):  # fmt: skip
        cost.hear(message)
    assert meter.spent(SHOP) == 19


def test_what_is_told_after_a_hang_up_is_charged_too() -> None:
    meter = Meter()
    assert meter.reserve(SHOP, 50)
    cost = Charge(meter, SHOP).request(50)
    cost.hear({})
    cost.hear({"prompt_tokens": 10, "tokens": 2})
    cost.leave()
    assert meter.spent(SHOP) == 12 and meter.reserved(SHOP) == 50
    cost.hear({"prompt_tokens": 10, "tokens": 4, "error": "cancelled"})
    assert meter.spent(SHOP) == 14 and meter.reserved(SHOP) == 0
