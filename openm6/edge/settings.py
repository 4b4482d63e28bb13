"""The settings of an edge device (box.toml)."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openm6.core.errors import UsageError, cut, suggest

ALL, FEATURES, NOTHING = "all", "features", "nothing"
MODES = (ALL, FEATURES, NOTHING)
"""Data that may leave the device, from everything to nothing."""

DAY_MS = 86_400_000
NEEDED = ("privacy", "offline", "encrypt")
"""Keys without which box.toml is refused: they decide which data may leave the device or lie on its disk."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys of box.toml (COMMENTS)."""

    cloud: str = ""
    key: str = ""
    model: str = ""
    name: str = "edge"
    privacy: str = "all"
    offline: bool = False
    deadline_ms: int = 3000
    requests_per_hour: int = 1000
    deferral_rate: float = 0.0
    audit_rate: float = 0.02
    keep_mb: int = 256
    encrypt: str = ""
    statistics_minutes: float = 15.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            kinds: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
            kind = kinds[str(one.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and one.type != "bool"):
                raise UsageError(f"{one.name} is {value!r}: it has to be {one.type}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{one.name} is {value}: it has to be a number.")
        if self.privacy not in MODES:
            raise UsageError(f"privacy is {self.privacy!r}: it can be {', '.join(MODES)}.")
        if "@" in self.cloud:  # the address stands in log and status, which no password may
            raise UsageError("cloud has a name in front of its host: give the address alone, and a key by `key`.")
        if self.cloud and not _is_address(self.cloud):
            raise UsageError(f"cloud is {self.cloud!r}: give an address such as https://m6.example:8000.")
        for name in ("key", "encrypt"):
            if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", getattr(self, name)):  # a key itself is not repeated here
                raise UsageError(f"{name} has to be the name of an environment variable, such as M6_KEY, not a key.")
        if len(self.name) > 64 or not re.fullmatch(r"[\w.-]*[^\W_][\w.-]*", self.name):  # the cloud takes no other one
            raise UsageError(f"name is {cut(self.name)!r}: it has letters, digits, - _ and . alone, at most 64.")
        if not 0 < self.audit_rate <= 1:
            raise UsageError(f"audit_rate is {self.audit_rate}: a fraction above 0, up to 1.")
        if self.deferral_rate and not self.audit_rate < self.deferral_rate < 1:
            raise UsageError(
                f"deferral_rate is {self.deferral_rate}: 0 (by the threshold), or above audit_rate ({self.audit_rate}) "
                "and below 1."
            )
        for name in ("deadline_ms", "keep_mb"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}: it has to be above 0.")
        if self.deadline_ms > DAY_MS:
            raise UsageError(f"deadline_ms is {self.deadline_ms}: it can be a day at most ({DAY_MS}).")
        if self.requests_per_hour < 0 or self.statistics_minutes < 0:
            raise UsageError("requests_per_hour and statistics_minutes cannot be below 0.")

    @property
    def uncertain_rate(self) -> float:
        """Fraction of the requests that is deferred as the least confident; 0: by the threshold."""
        return self.deferral_rate - self.audit_rate if self.deferral_rate else 0.0

    @property
    def asks_cloud(self) -> bool:
        """Whether anything may be sent."""
        return bool(self.cloud) and not self.offline and self.privacy != NOTHING

    @property
    def cloud_key(self) -> str:
        """The value of the environment variable `key`; "" without one."""
        return os.environ.get(self.key, "") if self.key else ""


COMMENTS = {
    "cloud": 'the server to which uncertain requests are deferred; "": none',
    "key": 'the environment variable that holds its key; "": it takes none',
    "model": 'a model\'s name there; "": the first one',
    "name": "of this device, in the statistics for the cloud",
    "privacy": "all: requests are sent as they are; features: pictures as features of the cloud's encoder; nothing",
    "offline": "true: nothing is sent for now",
    "deadline_ms": "for an answer of the cloud; after that the device answers by itself, and says so",
    "requests_per_hour": "maximum number of deferred requests an hour",
    "deferral_rate": "fraction of the requests to defer, the least confident and audits (0.15); 0: by the threshold",
    "audit_rate": "fraction of the confident answers that are checked by the cloud",
    "keep_mb": "of the cloud's answers, stored to learn from; the oldest are deleted first",
    "encrypt": 'the environment variable with the key of the answer store (openm6-edge new-key); "": no encryption',
    "statistics_minutes": "between two reports of counts to the cloud; 0: none",
}


def values_in(file: Path, content: bytes) -> dict[str, Any]:
    """The values of box.toml. Raises UsageError for invalid TOML."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error}.") from None


def settings_in(file: Path, values: Mapping[str, Any]) -> Settings:
    """As `settings_of`, with the file's name in errors. A file without one of NEEDED may have been cut off, and is
    refused: the default might allow what the file forbade."""
    try:
        settings = settings_of(values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    if missing := [name for name in NEEDED if name not in values]:
        raise UsageError(f"{file} lacks {', '.join(missing)}: set which data may leave the device or lie on its disk.")
    return settings


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Raises UsageError for an unknown key or an invalid value."""
    known = [one.name for one in fields(Settings)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown key {name}.{suggest(name, known)} Known: {', '.join(known)}.")
    return Settings(**values)


def written(settings: Settings) -> str:
    """The content of box.toml, with a comment on each key."""
    lines = []
    for one in fields(Settings):
        value = getattr(settings, one.name)
        told = _as_toml(value) if isinstance(value, str) else str(value).lower()
        lines.append(f"# {COMMENTS[one.name]}\n{one.name} = {told}\n")
    return "\n".join(lines)


def _as_toml(text: str) -> str:
    """A TOML string: JSON's, which leaves one character as it is that TOML does not allow."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_address(text: str) -> bool:
    """Whether this is the address of a server; a query or fragment, which would be ignored, is none of it."""
    try:
        parts = urlsplit(text)
        (parts.hostname or "").encode("idna")
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            and parts.path.isascii() and " " not in parts.path and not parts.query and not parts.fragment
        )  # fmt: skip
    except ValueError:  # of a port that is none, or a host
        return False
