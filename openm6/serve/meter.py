"""Requests and tokens of each key, and the cost of a request.

A request costs its prompt (the positions that the model reads) and the tokens computed for its answer: for a text those
that are written, with the end token; for beams, steps times beams; for pictures the codes of all candidates in every
pass; for vectors and heads none. The cost is charged as the model's process reports it, even after the client has left.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.core.errors import ErrorKind, UsageError
from openm6.serve.keys import Key

log = logging.getLogger("openm6.serve")

MINUTE, DAY = 60, 86_400
"""Seconds."""

_TABLES = """
CREATE TABLE IF NOT EXISTS spent (name TEXT, day INTEGER, tokens INTEGER, PRIMARY KEY (name, day)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asked (name TEXT, at REAL);
CREATE INDEX IF NOT EXISTS asked_by ON asked (name, at);
"""


@dataclass(frozen=True, slots=True)
class Beyond:
    """Why a key may not make a request now (REQUEST_LIMIT or TOKEN_LIMIT), and the seconds after which it may."""

    limit: ErrorKind
    message: str
    seconds: float


class Meter:
    """The requests and tokens of each key, in a SQLite file that servers with the same file of keys share; without a
    path, or where the file cannot be written, in memory. A count that was written survives the server's death.

    Raises UsageError for a damaged file.
    """

    def __init__(self, path: Path | None = None):
        self._new: Counter[tuple[str, int]] = Counter()  # tokens by key and day that are not written yet
        self._reserved: Counter[str] = Counter()
        self._failed = self._planned = False
        try:
            self._file = _opened(path)
        except (sqlite3.OperationalError, OSError) as error:
            log.warning("What keys spend is counted in memory alone: %s cannot be written (%s).", path, error)
            self._file = _opened(None)

    def count(self, key: Key) -> Beyond | None:
        """Count a request; None where the key may make it, else the reason why not (then nothing is counted)."""
        beyond = self.beyond(key)
        if beyond is not None or not key.per_minute:
            return beyond
        now = time.time()
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.execute("DELETE FROM asked WHERE name = ? AND at <= ?", (key.name, now - MINUTE))
                number, first = self._asked(key)
                if number < key.per_minute:
                    self._file.execute("INSERT INTO asked VALUES (?, ?)", (key.name, now))
                    return None
        except sqlite3.Error as error:
            self._tell(error)
            return None
        until = first + MINUTE
        message = f"The key {key.name} has asked {number} requests within a minute and may ask {key.per_minute}"
        return Beyond(ErrorKind.REQUEST_LIMIT, f"{message}: it may ask again at {_utc(until)}.", until - now)

    def beyond(self, key: Key) -> Beyond | None:
        """The reason why the key may not spend tokens now; None where it may."""
        if not key.per_day or (spent := self.spent(key)) < key.per_day:
            return None
        now = time.time()
        until = (now // DAY + 1) * DAY
        message = f"The key {key.name} has spent {spent} tokens today and may spend {key.per_day} a day"
        return Beyond(ErrorKind.TOKEN_LIMIT, f"{message}: it may ask again at {_utc(until)}.", until - now)

    def spent(self, key: Key) -> int:
        """Tokens that the key has spent today (UTC), at all servers."""
        day, written = int(time.time() // DAY), 0
        try:
            query = "SELECT tokens FROM spent WHERE name = ? AND day = ?"
            written = (self._file.execute(query, (key.name, day)).fetchone() or (0,))[0]
        except sqlite3.Error as error:
            self._tell(error)
        return int(written) + self._new[key.name, day]

    def reserve(self, key: Key, most: int) -> bool:
        """Reserve the highest cost of a request until `release`. False where the running requests could use up the rest
        of the limit, so that a key exceeds its limit by one request at most."""
        running = self.reserved(key)
        if key.per_day and running and running >= key.per_day - self.spent(key):
            return False
        self._reserved[key.name] += most
        return True

    def release(self, key: Key, most: int) -> None:
        self._reserved[key.name] -= most

    def reserved(self, key: Key) -> int:
        """Tokens that are reserved for the key's running requests."""
        return self._reserved[key.name]

    def spend(self, key: Key, tokens: int) -> None:
        """Add tokens to those that the key has spent. In a server, those of one turn of the event loop are written
        together."""
        self._new[key.name, int(time.time() // DAY)] += tokens
        if self._planned:
            return
        try:
            asyncio.get_running_loop().call_soon(self.keep)
            self._planned = True
        except RuntimeError:
            self.keep()

    def keep(self) -> None:
        """Write the counts that are not written yet. On a full disk they stay in memory until the next time."""
        self._planned = False
        if not (rows := [(*which, tokens) for which, tokens in self._new.items()]):
            return
        add = "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens"
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.executemany(add, rows)
        except sqlite3.Error as error:
            self._tell(error)
        else:
            self._new.clear()
            self._failed = False

    def headers(self, key: Key) -> dict[str, str]:
        """The key's limits as headers of OpenAI's API: x-ratelimit-{limit,remaining,reset}-{requests,tokens}."""
        now, found = time.time(), {}
        if key.per_minute:
            number, first = 0, now
            with suppress(sqlite3.Error):
                number, first = self._asked(key, now - MINUTE)
            found["requests"] = key.per_minute, number, first + MINUTE - now if number else 0
        if key.per_day:
            found["tokens"] = key.per_day, self.spent(key), DAY - now % DAY
        return {
            f"x-ratelimit-{name}-{what}": value
            for what, (limit, used, seconds) in found.items()
            for name, value in (
                ("limit", str(limit)), ("remaining", str(max(0, limit - used))), ("reset", _duration(seconds))
            )
        }  # fmt: skip

    def _asked(self, key: Key, since: float = 0.0) -> tuple[int, float]:
        """Number of requests since a time, and the time of the first of them."""
        query = "SELECT count(*), min(at) FROM asked WHERE name = ? AND at > ?"
        number, first = self._file.execute(query, (key.name, since)).fetchone()
        return int(number), float(first or 0.0)

    def _tell(self, error: sqlite3.Error) -> None:
        if not self._failed:
            log.warning("What keys spend cannot be written for now, and is counted in memory: %s.", error)
        self._failed = True


def _opened(path: Path | None) -> sqlite3.Connection:
    """The database. Each statement is a transaction of its own, or part of one from BEGIN on; a finished transaction
    survives the death of the process. Raises UsageError for a damaged file, OperationalError or OSError for one that
    cannot be written."""
    if path is not None:
        path.touch(0o600)
    file = sqlite3.connect(path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False)
    try:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
        file.executescript(_TABLES)
        file.execute("SELECT name, day, tokens FROM spent").fetchone()
        with file:
            file.execute("BEGIN IMMEDIATE")  # whether it can be written
    except sqlite3.DatabaseError as error:
        file.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise UsageError(f"{path} is damaged: remove it, and all keys begin a new day.") from None
    return file


class Charge:
    """The charge of requests that are answered together (the choices of a chat): their prompt once, and all written
    tokens. `prompt_tokens` and `tokens` are charged to the key, and reported in `usage`."""

    def __init__(self, meter: Meter, key: Key):
        self._meter, self.key = meter, key
        self._costs: list[Cost] = []
        self._charged = 0

    def request(self, most: int) -> Cost:
        """Add a request, for which `most` tokens are reserved."""
        cost = Cost(self, most)
        self._costs.append(cost)
        return cost

    @property
    def prompt_tokens(self) -> int:
        return max((cost.prompt_tokens for cost in self._costs), default=0)

    @property
    def tokens(self) -> int:
        return sum(cost.tokens for cost in self._costs)

    def settle(self) -> None:
        """Charge the tokens that are not charged yet."""
        total = self.prompt_tokens + self.tokens
        if total > self._charged:
            self._meter.spend(self.key, total - self._charged)
            self._charged = total

    def release(self, most: int) -> None:
        self._meter.release(self.key, most)


class Cost:
    """The cost of one request so far. If several processes worked at it, the larger counts are charged, so that it is
    charged once."""

    def __init__(self, charge: Charge, most: int):
        self.prompt_tokens = self.tokens = 0
        self._charge, self._most = charge, most
        self._over, self._left = True, False  # no process works at it yet

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in a message about the request (pending.Heard)."""
        self.prompt_tokens = max(self.prompt_tokens, message.get("prompt_tokens", 0))
        self.tokens = max(self.tokens, message.get("tokens", 0))
        self._over = "value" in message or "error" in message
        self._charge.settle()
        self._release()

    def leave(self) -> None:
        """The client has left; a last message may still arrive."""
        self._left = True
        self._release()

    def _release(self) -> None:
        if self._over and self._left:
            self._charge.release(self._most)
            self._most = 0


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def _duration(seconds: float) -> str:
    """A duration in OpenAI's format: 7h12m3s."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
