"""The settings of a box, as box.toml has them."""

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
"""What may leave the box, from everything to nothing."""

DAY_MS = 86_400_000
NEEDED = ("privacy", "offline", "encrypt")
"""Keys without which box.toml is not used: they say what may leave the box, and how it lies on the disk."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What box.toml says."""

    cloud: str = ""
    key: str = ""
    model: str = ""
    name: str = "edge"
    privacy: str = "all"
    offline: bool = False
    deadline_ms: int = 3000
    requests_per_hour: int = 1000
    share: float = 0.0
    audit: float = 0.02
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
        if not 0 < self.audit <= 1:
            raise UsageError(f"audit is {self.audit}: a share above 0, up to 1.")
        if self.share and not self.audit < self.share < 1:
            raise UsageError(f"share is {self.share}: 0 (by the threshold), or above audit ({self.audit}) and below 1.")
        for name in ("deadline_ms", "keep_mb"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}: it has to be above 0.")
        if self.deadline_ms > DAY_MS:
            raise UsageError(f"deadline_ms is {self.deadline_ms}: it can be a day at most ({DAY_MS}).")
        if self.requests_per_hour < 0 or self.statistics_minutes < 0:
            raise UsageError("requests_per_hour and statistics_minutes cannot be below 0.")

    @property
    def least_sure(self) -> float:
        """Share of what comes in that is asked for being the least sure; 0: by the threshold."""
        return self.share - self.audit if self.share else 0.0

    @property
    def asks_cloud(self) -> bool:
        """Whether anything may be sent."""
        return bool(self.cloud) and not self.offline and self.privacy != NOTHING

    @property
    def cloud_key(self) -> str:
        """The value of the variable `key`; "" where none is named, or it is not set."""
        return os.environ.get(self.key, "") if self.key else ""


COMMENTS = {
    "cloud": 'the server that is asked what this box is not sure of; "": none',
    "key": 'the environment variable that holds its key; "": it takes none',
    "model": 'a model\'s name there; "": its first',
    "name": "of this box, in the statistics that the cloud gets",
    "privacy": "all: what is not sure is sent; features: of pictures only the cloud model's features; nothing",
    "offline": "true: nothing is sent for now",
    "deadline_ms": "for an answer of the cloud; then the box answers by itself, and says so",
    "requests_per_hour": "that the cloud is asked at most",
    "share": "of what comes in so much is asked, the least sure and audits (0.15); 0: all that is below the threshold",
    "audit": "share of the sure answers that are asked too, to see whether they are right",
    "keep_mb": "of what the cloud answered, kept to learn from; the oldest goes first",
    "encrypt": 'the variable that holds the key of what is kept (openm6-edge new-key); "": it is not encrypted',
    "statistics_minutes": "between two reports of counts to the cloud; 0: none",
}


def values_in(file: Path, content: bytes) -> dict[str, Any]:
    """The values of box.toml. Raises UsageError for what is not TOML."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error}.") from None


def settings_in(file: Path, values: Mapping[str, Any]) -> Settings:
    """As `settings_of`, with the file's name in its errors. A file without one of NEEDED may have been cut: it is
    refused, for the default may allow what the file forbade."""
    try:
        settings = settings_of(values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    if missing := [name for name in NEEDED if name not in values]:
        raise UsageError(f"{file} does not say {', '.join(missing)}: write what may leave the box and lie on its disk.")
    return settings


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Raises UsageError for what is unknown or cannot be meant."""
    known = [one.name for one in fields(Settings)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown key {name}.{suggest(name, known)} Known: {', '.join(known)}.")
    return Settings(**values)


def written(settings: Settings) -> str:
    """box.toml, with what each key means."""
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
    """Whether a server can be asked at this address, with all that is in it: a query would be left out."""
    try:
        parts = urlsplit(text)
        (parts.hostname or "").encode("idna")
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            and parts.path.isascii() and " " not in parts.path and not parts.query and not parts.fragment
        )  # fmt: skip
    except ValueError:  # of a port that is none, or a host
        return False
