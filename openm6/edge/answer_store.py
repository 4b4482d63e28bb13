"""The answer store of an edge device: the cloud's answers, stored to learn from (a replay buffer). It is a SQLite file
that only its owner can read, of a limited size, encrypted on request, and never holds more than the privacy mode
allows.

    all         the record, pictures included, and the answer
    features    the same, with the edge model's own features in place of a picture
    nothing     nothing

Answers are deleted in two cases: a stricter mode forbids them (they are overwritten when the file is opened, and the
log reports their number), or the size is used up (the oldest are deleted and counted).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import dumps, loads, plain
from openm6.edge.device import ALL, FEATURES, MODES, NOTHING

log = logging.getLogger("openm6.edge")
HELD_OUT = 5
"""One of so many stored answers is held out of learning, to evaluate on."""
STORE = "kept.sqlite"
_BESIDE = ("", "-journal", "-wal", "-shm")
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
ENCRYPTED = 4
_ALLOWED = {ALL: (ALL, FEATURES), FEATURES: (FEATURES,), NOTHING: ()}
"""By the present mode, the modes of the answers that may stay."""
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, task TEXT, mode TEXT, secret INTEGER, size INTEGER, body BLOB);
CREATE TABLE IF NOT EXISTS seen (
    id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT, version TEXT, seen BLOB, right REAL, weight REAL);
CREATE TABLE IF NOT EXISTS spent (hour INTEGER PRIMARY KEY, requests INTEGER);
"""


class StoreError(OpenM6Error):
    """An answer store that cannot be opened, read or written. `is_damaged`: the file is no valid database."""

    def __init__(self, message: str, is_damaged: bool = False):
        super().__init__(message)
        self.is_damaged = is_damaged


class InterruptedWriteError(StoreError):
    """A store opened read-only beside the journal of an interrupted write."""


class Cipher:
    """Fernet (AES and an HMAC) without its base64, which would take a third more space."""

    def __init__(self, key: str):
        """`key`: as `new_key` makes it. Raises UsageError for an invalid one, or without cryptography installed."""
        try:
            self._fernet = _fernet()(key)
        except ValueError:
            raise UsageError("The key of the encryption is invalid: `openm6-edge new-key` makes one.") from None

    def encrypt(self, body: bytes) -> bytes:
        return base64.urlsafe_b64decode(self._fernet.encrypt(body))

    def decrypt(self, body: bytes) -> bytes:
        """Raises UsageError for a body that was encrypted with another key."""
        from cryptography.fernet import InvalidToken

        try:
            return bytes(self._fernet.decrypt(base64.urlsafe_b64encode(body)))
        except InvalidToken:
            raise UsageError("The answer was encrypted with another key.") from None


def new_key() -> str:
    return str(_fernet().generate_key().decode())


def _fernet() -> Any:
    try:
        from cryptography.fernet import Fernet
    except ImportError:
        raise UsageError("Encryption needs a package: pip install cryptography.") from None
    return Fernet


class AnswerStore:
    """An answer store. Several threads may use it. Every method raises StoreError where the disk refuses."""

    def __init__(self, file: Path | None, mode: str, limit: int, key: str | None = None, read_only: bool = False):
        """Open the file and apply mode and key: delete forbidden answers, encrypt plain ones.

        `file` None: in memory; `limit`: bytes of answers, before encryption; `key`: of the encryption (`new_key`);
        `read_only`: a snapshot is read, and file and journal stay unchanged.

        Raises UsageError for an invalid key, or one with which the file's answers were not encrypted, and
        InterruptedWriteError where a file to be read has to be repaired first.
        """
        self.file, self.mode, self.limit, self.trouble = file, mode, limit, ""
        self._lock, self._cipher = Lock(), Cipher(key) if key is not None else None
        if file is not None and not read_only:
            _make_private(file)
        name = f"{file.absolute().as_uri()}?mode=ro" if file and read_only else file or ":memory:"
        with _named(file):
            self._file = sqlite3.connect(name, 10, isolation_level=None, check_same_thread=False, uri=read_only)
        try:
            with _named(file):
                if read_only and file is not None:
                    self._begin_reading()
                else:
                    self._open()
        except BaseException:
            self._file.close()
            raise

    def _begin_reading(self) -> None:
        """Begin the only transaction of a read-only store. Raises InterruptedWriteError."""
        self._file.execute("BEGIN")
        for seconds in (0.1, 0):
            try:
                self._file.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                    raise
            # For a moment the journal that another process begins looks like one that was left.
            time.sleep(seconds)
        raise InterruptedWriteError(
            f"A write to {self.file} was interrupted. A start undoes it; what is kept can be counted, and tried with "
            "its key, only after that."
        )

    def _check_pages(self) -> None:
        if self._file.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise StoreError(f"{self.file} is damaged.", is_damaged=True)

    def _open(self) -> None:
        self._check_pages()
        for rule in ("journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=ON"):
            self._file.execute(f"PRAGMA {rule}")
        if not self._number("PRAGMA auto_vacuum"):  # setting it writes, which a full disk refuses
            self._file.execute("PRAGMA auto_vacuum=FULL")
        self._file.executescript(_TABLES)
        if self._forget_forbidden() + self._encrypt_plain():
            self._file.execute("VACUUM")
        promised = promise(self.mode, self._cipher is not None)
        try:
            self._file.execute(f"PRAGMA user_version={promised}")
        except sqlite3.OperationalError as error:
            if self._number("PRAGMA user_version") != promised:
                raise
            # The file cannot be written for now, but holds nothing forbidden, and what was learned can be read.
            self.trouble = f"{self.file} cannot be written ({error})."
            log.error("%s", self.trouble)

    def close(self) -> None:
        self._file.close()

    def revoke(self) -> None:
        """Write nothing more with this handle; reading still works."""
        with self._lock:
            self.mode = NOTHING

    def keep(self, task: str, record: Mapping[str, Any], value: Any, edge: Any) -> int:
        """Store a record (by the mode, with features in place of pictures), the cloud's answer and the edge model's.
        Returns the number of older answers that were deleted to make room."""
        inputs = {name: one for name, one in record.items() if not name.startswith("_")}
        body = dumps({"record": inputs, "value": value, "edge": edge}, plain).encode()
        size = len(body)  # before encryption: a key does not reduce the number of answers
        with self._written():
            if self.mode == NOTHING:
                return 0
            if size > self.limit:
                raise StoreError(f"An answer of {size:,} bytes is larger than all that may be kept ({self.limit:,}).")
            body = self._cipher.encrypt(body) if self._cipher else body
            self._file.execute(
                "INSERT INTO answers (time, task, mode, secret, size, body) VALUES (?, ?, ?, ?, ?, ?)",
                (time.time(), task, self.mode, self._cipher is not None, size, body),
            )
            newer = "SELECT id, SUM(size) OVER (ORDER BY id DESC) AS bytes FROM answers"  # with the answer itself
            oldest = f"DELETE FROM answers WHERE id IN (SELECT id FROM ({newer}) WHERE bytes > ?)"
            return self._file.execute(oldest, (self.limit,)).rowcount

    def rows(self, task: str | None = None, until: int | None = None) -> Iterator[dict[str, Any]]:
        """Stored answers, the oldest first, as {id, task, record, value, edge}; up to the id `until`."""
        with self._used():
            self._check_key()
            found = self._file.execute(
                "SELECT id, task, secret, body FROM answers WHERE (? IS NULL OR task = ?) AND id <= ? ORDER BY id",
                (task, task, until if until is not None else 2**62),
            ).fetchall()
        for number, name, secret, body in found:
            try:
                content = loads(self._cipher.decrypt(body) if secret and self._cipher else body)
            except (ValueError, UsageError):
                log.error("the stored answer %d is damaged and is skipped", number)
                continue
            yield {"id": number, "task": name, **content}

    def tasks(self) -> dict[str, tuple[int, int]]:
        """Number of stored answers of each task, and the id of its last one."""
        with self._used():
            rows = self._file.execute("SELECT task, COUNT(*), MAX(id) FROM answers GROUP BY task").fetchall()
        return {task: (count, last) for task, count, last in rows}

    def counts(self) -> dict[str, int]:
        return {task: count for task, (count, _) in self.tasks().items()}

    def size(self) -> int:
        with self._used():
            return self._number("SELECT SUM(size) FROM answers")

    def pending(self) -> tuple[int, int]:
        """Numbers of answers that the mode forbids, and that are not encrypted though there is a key: those that a
        start of the device would delete and encrypt. Raises UsageError for another key, StoreError for a damaged
        file."""
        with self._used():
            self._check_pages()
            forbidden, plain = self._count_forbidden(), self._count(0) if self._cipher else 0
            self._check_key()
        return forbidden, plain

    def saw(self, task: str, calibration: str, seen: np.ndarray, right: float, weight: float, most: int) -> None:
        """Store what a calibrator has learned, numbers alone: the `most` newest of a task's present calibration."""
        with self._written():
            if self.mode == NOTHING:
                return
            self._file.execute(
                "INSERT INTO seen (task, version, seen, right, weight) VALUES (?, ?, ?, ?, ?)",
                (task, calibration, seen.astype(np.float32).tobytes(), right, weight),
            )
            self._file.execute(
                "DELETE FROM seen WHERE task = ? AND (version != ? OR id <= "
                "(SELECT MAX(id) FROM seen WHERE task = ?) - ?)", (task, calibration, task, most),
            )  # fmt: skip

    def seen(self, task: str, calibration: str) -> list[tuple[np.ndarray, float, float]]:
        with self._used():
            rows = self._file.execute(
                "SELECT seen, right, weight FROM seen WHERE task = ? AND version = ? ORDER BY id", (task, calibration)
            ).fetchall()
        return [(np.frombuffer(seen, np.float32).astype(np.float64), right, weight) for seen, right, weight in rows]

    def spend(self, hour: int) -> None:
        with self._written():
            self._file.execute("DELETE FROM spent WHERE hour < ?", (hour,))
            self._file.execute(
                "INSERT INTO spent VALUES (?, 1) ON CONFLICT (hour) DO UPDATE SET requests = requests + 1", (hour,)
            )

    def spent(self, hour: int) -> int:
        with self._used():
            return self._number("SELECT requests FROM spent WHERE hour = ?", hour)

    def _number(self, query: str, *values: Any) -> int:
        """The number that a query gives; 0 for no row or NULL."""
        row = self._file.execute(query, values).fetchone()
        return int(row[0] or 0) if row else 0

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        with self._lock, _named(self.file):
            yield

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """A transaction: all or nothing that is written inside takes effect."""
        with self._used():
            try:
                self._file.execute("BEGIN IMMEDIATE")
                yield
                self._file.execute("COMMIT")
            except BaseException as error:
                if self.file is not None and isinstance(error, sqlite3.Error):
                    self.trouble = f"{self.file} cannot be written ({error})."
                with contextlib.suppress(sqlite3.Error):
                    self._file.execute("ROLLBACK")
                raise
            if self.file is not None:
                self.trouble = ""

    def _forget_forbidden(self) -> int:
        forbidden = self._count_forbidden()
        if not forbidden and self.mode != NOTHING:
            return 0
        with self._written():
            self._file.execute(f"DELETE FROM answers WHERE mode NOT IN ({_marks(self.mode)})", _ALLOWED[self.mode])
            if self.mode == NOTHING:
                self._file.execute("DELETE FROM seen")
        if forbidden:
            log.warning("%d stored answers were deleted: privacy = %s forbids them", forbidden, self.mode)
        return forbidden

    def _encrypt_plain(self) -> int:
        """Encrypt in place the answers that were stored without a key: all of them, or none where that is
        interrupted."""
        self._check_key()
        if not self._cipher or not self._count(0):
            return 0
        with self._written():
            numbers = [number for (number,) in self._file.execute("SELECT id FROM answers WHERE secret = 0")]
            for number in numbers:
                (body,) = self._file.execute("SELECT body FROM answers WHERE id = ?", (number,)).fetchone()
                update = "UPDATE answers SET secret = 1, body = ? WHERE id = ?"
                self._file.execute(update, (self._cipher.encrypt(body), number))
        log.warning("%d stored answers were encrypted in place", len(numbers))
        return len(numbers)

    def _check_key(self) -> None:
        """Raises UsageError where answers are encrypted with another key."""
        if count := self._count(1):
            where = f"{self.file} has {count} encrypted answers"
            if self._cipher is None:
                raise UsageError(
                    f"{where}, and no key is named: name the variable that holds it (encrypt in edge.toml), or move "
                    "the file away to begin a new one."
                )
            one = self._file.execute("SELECT body FROM answers WHERE secret = 1 LIMIT 1").fetchone()
            try:
                self._cipher.decrypt(one[0])
            except UsageError:
                raise UsageError(
                    f"{where}, and their key is another one: give that key, or move the file away to begin a new one."
                ) from None

    def _count(self, secret: int) -> int:
        return self._number("SELECT COUNT(*) FROM answers WHERE secret = ?", secret)

    def _count_forbidden(self) -> int:
        """Number of answers that the mode forbids."""
        modes = _ALLOWED[self.mode]
        return self._number(f"SELECT COUNT(*) FROM answers WHERE mode NOT IN ({_marks(self.mode)})", *modes)


def _make_private(file: Path) -> None:
    """Let only its owner read the file and those that SQLite writes beside it. Raises StoreError."""
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        for one in parts(file):
            if one.stat().st_mode & 0o077:
                one.chmod(0o600)
    except OSError as error:
        raise StoreError(f"{file} cannot be opened ({(error.strerror or str(error)).lower()}).") from None


@contextlib.contextmanager
def _named(file: Path | None) -> Iterator[None]:
    """SQLite's errors as StoreError, with the file's name."""
    try:
        yield
    except sqlite3.Error as error:
        is_damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
        raise StoreError(f"{file or 'The answer store'} cannot be used ({error}).", is_damaged) from None


def _marks(mode: str) -> str:
    return ", ".join("?" * len(_ALLOWED[mode]))


def promise(mode: str, is_encrypted: bool) -> int:
    """The number in the file's header (user_version) once it holds nothing that mode and encryption forbid."""
    return 1 + MODES.index(mode) + ENCRYPTED * is_encrypted


def parts(file: Path) -> list[Path]:
    """The file, and those that SQLite may have left beside it."""
    return [one for end in _BESIDE if (one := file.with_name(file.name + end)).exists()]


def is_empty(value: Any) -> bool:
    """True for an answer without content."""
    return value in ([], {}) or (isinstance(value, str) and not value.strip())


def is_held_out(row: Mapping[str, Any]) -> bool:
    """True for a stored answer that is held out; by its record, so that equal records are always on the same side."""
    digest = hashlib.sha256(dumps(row["record"], plain).encode()).digest()
    return digest[0] % HELD_OUT == 0
