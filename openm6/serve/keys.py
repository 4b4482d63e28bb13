"""API keys with their limits: generated here, shown once, stored as hashes.

The file is JSON: name to {"hash", "role", "per_minute", "per_day"}. A key is 32 random bytes, so that a plain
SHA-256 is safe to store: it cannot be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from openm6.core.errors import UsageError
from openm6.core.files import write_file

USE, MANAGE = "use", "manage"
ROLES = (USE, MANAGE)
PREFIX = "m6-"


@dataclass(frozen=True, slots=True)
class Key:
    """`per_minute`: requests; `per_day`: tokens, of prompts and answers (meter.py); 0: any number."""

    name: str
    hash: str
    role: str = USE
    per_minute: int = 0
    per_day: int = 0

    def may(self, role: str) -> bool:
        return self.role == MANAGE or role == USE


class Keys:
    """The keys of a file, which is read again when it changes."""

    def __init__(self, path: Path):
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._known: dict[str, Key] = {}

    def find(self, given: str) -> Key | None:
        """The key with this secret, or None."""
        self._follow()
        digest = _hash(given)
        found = None
        for key in self._known.values():  # all of them, in constant time
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found

    def add(self, name: str, role: str = USE, per_minute: int = 0, per_day: int = 0) -> str:
        """Add a key and return its secret, which cannot be shown again. Raises UsageError for a name that is taken."""
        self._follow()
        if name in self._known:
            raise UsageError(f"There is a key {name} already.")
        if role not in ROLES:
            raise UsageError(f"role is {role}; it is {' or '.join(ROLES)}.")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._known[name] = Key(name, _hash(secret), role, per_minute, per_day)
        self._write()
        return secret

    def remove(self, name: str) -> None:
        """Remove a key. Raises UsageError for an unknown name."""
        self._follow()
        if name not in self._known:
            raise UsageError(f"There is no key {name}.")
        del self._known[name]
        self._write()

    @property
    def spent(self) -> Path:
        """The file, beside that of the keys, with the tokens that keys have spent (meter.py)."""
        return self.path.with_name(f"{self.path.name}.spent")

    def list(self) -> list[Key]:
        self._follow()
        return list(self._known.values())

    def _follow(self) -> None:
        try:
            about = self.path.stat()
        except OSError:
            self._seen, self._known = None, {}
            return
        changed = about.st_mtime_ns, about.st_size, about.st_ino  # two changes may fall into one tick of the clock
        if changed == self._seen:
            return
        try:
            content = json.loads(self.path.read_text("utf-8"))
            self._known = {name: Key(name, **values) for name, values in content.items()}
        except (ValueError, TypeError, AttributeError):
            raise UsageError(f"{self.path.name} is not a valid file of keys.") from None  # clients see this message too
        self._seen = changed

    def _write(self) -> None:
        values = {key.name: {k: v for k, v in asdict(key).items() if k != "name"} for key in self._known.values()}
        self.path.parent.mkdir(parents=True, exist_ok=True)

        def fill(draft: Path) -> None:
            draft.touch(0o600)
            draft.write_text(json.dumps(values, ensure_ascii=False, indent=1), "utf-8")

        write_file(self.path, fill)
        self._seen = None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
