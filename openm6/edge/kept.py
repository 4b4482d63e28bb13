"""What the cloud answered, kept on the edge for learning: a SQLite file, within a size, encrypted if that is asked for,
and never more than the privacy mode allows.

    all         what was asked, pictures too, and the answer
    features    the same, of a picture the edge's own features in its place
    nothing     nothing

What a stricter mode forbids is deleted when the file is opened, and what is deleted is overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from openm6.errors import OpenM6Error, UsageError
from openm6.json_lines import dumps, loads, plain

if TYPE_CHECKING:
    from openm6.edge.box import Settings

ALL, FEATURES, NOTHING = "all", "features", "nothing"
MODES = (ALL, FEATURES, NOTHING)
HELD_OUT = 5
"""Of what is kept, one in so many is held out of learning, to measure on."""


class Kept:
    """The file of a box. Several threads may use it."""

    def __init__(self, file: Path, mode: str, limit: int, key: str | None = None):
        """`limit`: bytes of what is kept; `key`: of the encryption, as `new_key` makes it.

        Raises UsageError for a key that is none or another than the file's.
        """
        self.mode, self.limit = mode, limit
        self._lock, self._cipher = Lock(), _cipher(key)
        try:
            self._file = sqlite3.connect(file, check_same_thread=False, timeout=10, isolation_level=None)
            for rule in ("journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=ON", "auto_vacuum=FULL"):
                self._file.execute(f"PRAGMA {rule}")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, task TEXT, "
                "mode TEXT, secret INTEGER, size INTEGER, body BLOB)"
            )
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS seen (id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT, version TEXT, "
                "seen BLOB, right REAL, weight REAL)"
            )
            self._file.execute("CREATE TABLE IF NOT EXISTS spent (hour INTEGER PRIMARY KEY, requests INTEGER)")
            self._forget_forbidden()
            self._hide()
        except sqlite3.DatabaseError as error:
            raise OpenM6Error(f"{file} cannot be opened ({error}); what it kept is lost if it is deleted.") from None

    def close(self) -> None:
        self._file.close()

    def revoke(self) -> None:
        """From now on nothing is written by this handle, and what is in it can still be read."""
        with self._lock:
            self.mode = NOTHING

    def keep(self, task: str, record: Mapping[str, Any], value: Any, edge: Any) -> None:
        """A record (by the mode, with features in the place of pictures), the cloud's answer, and the edge's own.

        Raises OSError where the disk has no room.
        """
        if self.mode == NOTHING:
            return
        asked = {name: one for name, one in record.items() if not name.startswith("_")}
        body = dumps({"record": asked, "value": value, "edge": edge}, plain).encode()
        if self._cipher:
            body = self._cipher.encrypt(body)
        with self._written():
            if self.mode == NOTHING:  # revoked meanwhile
                return
            self._file.execute(
                "INSERT INTO answers (time, task, mode, secret, size, body) VALUES (?, ?, ?, ?, ?, ?)",
                (time.time(), task, self.mode, self._cipher is not None, len(body), body),
            )
            self._forget_oldest()

    def rows(self, task: str | None = None, until: int | None = None) -> Iterator[dict[str, Any]]:
        """What is kept, the oldest first: id, task, record, value, edge; up to the row `until`."""
        with self._lock:
            found = self._file.execute(
                "SELECT id, task, secret, body FROM answers WHERE (? IS NULL OR task = ?) AND id <= ? ORDER BY id",
                (task, task, until if until is not None else 2**62),
            ).fetchall()
        for number, name, secret, body in found:
            content = loads(self._opened(body) if secret else body)
            yield {"id": number, "task": name, **content}

    def tasks(self) -> dict[str, tuple[int, int]]:
        """How many of each task are kept, and the number of the last."""
        with self._lock:
            rows = self._file.execute("SELECT task, COUNT(*), MAX(id) FROM answers GROUP BY task").fetchall()
        return {task: (count, last) for task, count, last in rows}

    def counts(self) -> dict[str, int]:
        return {task: count for task, (count, _) in self.tasks().items()}

    def size(self) -> int:
        with self._lock:
            return int(self._file.execute("SELECT COALESCE(SUM(size), 0) FROM answers").fetchone()[0])

    # What a Sureness has learned, and what was asked of the cloud: numbers alone

    def saw(self, task: str, version: str, seen: np.ndarray, right: float, weight: float, most: int) -> None:
        if self.mode == NOTHING:
            return
        with self._written():
            if self.mode == NOTHING:
                return
            self._file.execute(
                "INSERT INTO seen (task, version, seen, right, weight) VALUES (?, ?, ?, ?, ?)",
                (task, version, seen.astype(np.float32).tobytes(), right, weight),
            )
            self._file.execute(
                "DELETE FROM seen WHERE task = ? AND (version != ? OR id <= "
                "(SELECT MAX(id) FROM seen WHERE task = ?) - ?)", (task, version, task, most),
            )  # fmt: skip

    def seen(self, task: str, version: str) -> list[tuple[np.ndarray, float, float]]:
        with self._lock:
            rows = self._file.execute(
                "SELECT seen, right, weight FROM seen WHERE task = ? AND version = ? ORDER BY id", (task, version)
            ).fetchall()
        return [(np.frombuffer(seen, np.float32).astype(np.float64), right, weight) for seen, right, weight in rows]

    def spend(self, hour: int) -> None:
        with self._written():
            self._file.execute("DELETE FROM spent WHERE hour < ?", (hour,))
            self._file.execute(
                "INSERT INTO spent VALUES (?, 1) ON CONFLICT (hour) DO UPDATE SET requests = requests + 1", (hour,)
            )

    def spent(self, hour: int) -> int:
        with self._lock:
            row = self._file.execute("SELECT requests FROM spent WHERE hour = ?", (hour,)).fetchone()
        return row[0] if row else 0

    # Inside

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._file.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._file.execute("ROLLBACK")
                raise

    def _forget_oldest(self) -> None:
        used = self._file.execute("SELECT COALESCE(SUM(size), 0) FROM answers").fetchone()[0]
        while used > self.limit:
            number, size = self._file.execute("SELECT id, size FROM answers ORDER BY id LIMIT 1").fetchone()
            self._file.execute("DELETE FROM answers WHERE id = ?", (number,))
            used -= size

    def _forget_forbidden(self) -> None:
        allowed = {ALL: (ALL, FEATURES), FEATURES: (FEATURES,), NOTHING: ()}[self.mode]
        marks = ", ".join("?" * len(allowed))
        self._file.execute(f"DELETE FROM answers WHERE mode NOT IN ({marks})", allowed)
        if self.mode == NOTHING:
            self._file.execute("DELETE FROM seen")
        self._file.execute("VACUUM")

    def _hide(self) -> None:
        """What was kept before there was a key is encrypted now."""
        if not self._cipher:
            return
        rows = self._file.execute("SELECT id, body FROM answers WHERE secret = 0").fetchall()
        for number, body in rows:
            hidden = self._cipher.encrypt(body)
            self._file.execute(
                "UPDATE answers SET secret = 1, body = ?, size = ? WHERE id = ?", (hidden, len(hidden), number)
            )
        if rows:
            self._file.execute("VACUUM")
        one = self._file.execute("SELECT body FROM answers WHERE secret = 1 LIMIT 1").fetchone()
        if one:
            self._opened(one[0])

    def _opened(self, body: bytes) -> bytes:
        if not self._cipher:
            raise UsageError("What is kept is encrypted: give the key (box.toml names its variable).")
        from cryptography.fernet import InvalidToken

        try:
            return bytes(self._cipher.decrypt(body))
        except InvalidToken:
            raise UsageError("What is kept was encrypted with another key.") from None


def open_kept(folder: Path, settings: Settings) -> Kept:
    """The file of a box. Raises UsageError where the key of its encryption is missing."""
    key = None
    if settings.encrypt:
        key = os.environ.get(settings.encrypt)
        if not key:
            raise UsageError(
                f"The box encrypts what it keeps with the key in ${settings.encrypt}, which is not set. "
                "`openm6-edge new-key` makes one."
            )
    return Kept(folder / "kept.sqlite", settings.privacy, settings.keep_mb * 2**20, key)


def is_held_out(row: Mapping[str, Any]) -> bool:
    """By what was asked: the same question about the same picture is never on both sides."""
    digest = hashlib.sha256(dumps(row["record"], plain).encode()).digest()
    return digest[0] % HELD_OUT == 0


def new_key() -> str:
    _needs_cryptography()
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def _cipher(key: str | None) -> Any:
    if key is None:
        return None
    _needs_cryptography()
    from cryptography.fernet import Fernet

    try:
        return Fernet(key)
    except ValueError:
        raise UsageError("The key of the encryption is none: `openm6-edge new-key` makes one.") from None


def _needs_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UsageError("Encryption needs a package: pip install cryptography.") from None
