"""Rejected records: written down with the reason, counted, and too many of them stop the work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from openm6.core.errors import DataError
from openm6.core.files import cut_torn_line, dumps, whole_lines


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used: its place (file:line, file#member) and the reason."""

    where: str
    reason: str


OnReject = Callable[[Reject], None]
"""A function called with each record that cannot be used."""


def place_of(where: str) -> tuple[str, int]:
    """File and number of a place such as file:line or file#row; 0 where it has no number."""
    found = re.fullmatch(r"(.*)[:#](\d+)", where, re.S)
    return (found[1], int(found[2])) if found else (where, 0)


def count_rejected(folder: Path) -> int:
    """The number of records that the processes of a run could not use, from the files in its folder; a record that
    several of them met counts once."""
    lines = (line for path in folder.glob("rejects*.jsonl") for line in whole_lines(path))
    return len({(line.get("source"), line["where"]) for line in lines})


class Rejects:
    """Counts records, good and bad; every bad one becomes a line of JSON in `path` (created at the first).

    Raises DataError from `count` when there are at least `minimum` bad records and they are more than a fraction
    `share` of all. Thread-safe."""

    def __init__(self, path: str | Path, share: float = 0.05, minimum: int = 20):
        self.path, self.share, self.minimum = Path(path), share, minimum
        self.seen = self.bad = 0
        self._written: set[str] | None = None
        self._reasons: Counter[str] = Counter()
        self._lock = Lock()

    def saw(self, number: int = 1) -> None:
        """Count usable records."""
        with self._lock:
            self.seen += number

    def count(self, where: str, reason: str, source: str = "") -> None:
        """Count a record that cannot be used; one that was met before (in an earlier epoch, or by a resumed run) is not
        written again."""
        with self._lock:
            self.seen += 1
            self.bad += 1
            # The place is removed, so that the same fault is one entry of the tally.
            self._reasons[reason.replace(f"{where}: ", "").replace(where, "").strip()] += 1
            if self._written is None:
                self._written = self._before()
            if where not in self._written:
                self._written.add(where)
                self._write({"where": where, "reason": reason, "source": source})
            if self.bad >= self.minimum and self.bad > self.share * self.seen:
                raise DataError(self._verdict(source))

    def summary(self) -> str:
        """`3 of 400 records could not be used (most often: ...)`."""
        reason = self._reasons.most_common(1)[0][0] if self._reasons else "none"
        return f"{self.bad} of {self.seen} records could not be used (most often: {reason.rstrip('.')})"

    def _verdict(self, source: str) -> str:
        text = self.summary()
        if source:
            text = text.replace(" records could", f" records (the last of {source}) could", 1)
        return f"{text}; at most {self.share:.0%} may be. See {self.path}."

    def _before(self) -> set[str]:
        """Places of the bad records that are already in the file."""
        cut_torn_line(self.path)
        return {str(line["where"]) for line in whole_lines(self.path)}

    def _write(self, line: dict[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(dumps(line) + "\n")
