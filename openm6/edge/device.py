"""The folder of an edge device, and its settings.

edge.toml               settings, written once, to be edited; a change takes effect at once (live.py)
versions/0001/package   the ONNX bundle that answers (package.py), and calibration-TASK.npz of each calibrated task
versions/0001/model     the model it was exported from, to learn on; not needed by a device that only answers
current                 the number of the version that answers; replaced atomically
image_encoder/          the image encoder of the cloud's model, to send features in place of pictures
kept.sqlite             the answer store (answer_store.py)
serving.json, edge.log  the state of the serving process (status.py), and its log
openm6-edge             the program: `python openm6-edge serve`
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openm6.core.errors import OpenM6Error, UsageError, cut, suggest
from openm6.core.files import write_text

FILE, CURRENT, VERSIONS, IMAGE_ENCODER = "edge.toml", "current", "versions", "image_encoder"

ALL, FEATURES, NOTHING = "all", "features", "nothing"
MODES = (ALL, FEATURES, NOTHING)
"""Data that may leave the device, from everything to nothing."""

DAY_MS = 86_400_000
NEEDED = ("privacy", "offline", "encrypt")
"""Keys without which edge.toml is refused: they decide which data may leave the device or lie on its disk."""


def _key(default: Any, comment: str) -> Any:
    """A key of edge.toml: its default, and the comment that is written above it."""
    return field(default=default, metadata={"comment": comment})


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys of edge.toml. Raises UsageError for an invalid value."""

    cloud: str = _key("", 'the server to which uncertain requests are deferred; "": none')
    key: str = _key("", 'the environment variable that holds its key; "": it takes none')
    model: str = _key("", 'a model\'s name there; "": the first one')
    name: str = _key("edge", "of this device, in the statistics for the cloud")
    privacy: str = _key(
        "all", "all: requests are sent as they are; features: pictures as features of the cloud's encoder; nothing"
    )
    offline: bool = _key(False, "true: nothing is sent for now")
    deadline_ms: int = _key(3000, "for an answer of the cloud; after that the device answers by itself, and says so")
    requests_per_hour: int = _key(1000, "maximum number of deferred requests an hour")
    deferral_rate: float = _key(
        0.0, "fraction of the requests to defer, the least confident and audits (0.15); 0: by the threshold"
    )
    audit_rate: float = _key(0.02, "fraction of the confident answers that are checked by the cloud")
    keep_mb: int = _key(256, "of the cloud's answers, stored to learn from; the oldest are deleted first")
    encrypt: str = _key(
        "", 'the environment variable with the key of the answer store (openm6-edge new-key); "": no encryption'
    )
    statistics_minutes: float = _key(15.0, "between two reports of counts to the cloud; 0: none")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), type(one.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UsageError(f"{one.name} is {value!r}: it has to be {kind.__name__}.")
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
        """True where anything may be sent."""
        return bool(self.cloud) and not self.offline and self.privacy != NOTHING

    @property
    def cloud_key(self) -> str:
        """The value of the environment variable `key`; "" without one."""
        return os.environ.get(self.key, "") if self.key else ""


def _is_address(text: str) -> bool:
    """True for the address of a server, without a query or fragment, which would be ignored."""
    try:
        parts = urlsplit(text)
        (parts.hostname or "").encode("idna")
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            and parts.path.isascii() and " " not in parts.path and not parts.query and not parts.fragment
        )  # fmt: skip
    except ValueError:  # of a port that is none, or a host
        return False


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Raises UsageError for an unknown key or an invalid value."""
    known = [one.name for one in fields(Settings)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown key {name}.{suggest(name, known)} Known: {', '.join(known)}.")
    return Settings(**values)


def parse_settings(file: Path, content: bytes) -> tuple[Settings, Set[str]]:
    """The settings of edge.toml, and the keys that it has. Raises UsageError, with the file's name, for invalid TOML,
    an unknown key and an invalid value; and without one of NEEDED: the file may have been cut off, and the default
    might allow what it forbade."""
    try:
        values = tomllib.loads(content.decode("utf-8"))
        settings = settings_of(values)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{file}: {str(error).removesuffix('.')}.") from None
    if missing := [name for name in NEEDED if name not in values]:
        raise UsageError(f"{file} lacks {', '.join(missing)}: set which data may leave the device or lie on its disk.")
    return settings, values.keys()


def settings_toml(settings: Settings) -> str:
    """The content of edge.toml, with a comment on each key."""
    lines = []
    for one in fields(Settings):
        value = getattr(settings, one.name)
        # A TOML string is JSON's, which leaves one character as it is that TOML does not allow.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"# {one.metadata['comment']}\n{one.name} = {text}\n")
    return "\n".join(lines)


class EdgeDevice:
    """An edge device's folder, with its settings."""

    def __init__(self, path: str | Path, settings: Settings | None = None):
        """`settings`: in place of edge.toml, which is not read then. Raises UsageError for a folder that is no edge
        device, or an invalid edge.toml."""
        self.path, self.content = Path(path), b""
        self.keys: Set[str] = frozenset()
        if settings is None:
            self.content = read_content(self.path)
            settings, self.keys = parse_settings(self.path / FILE, self.content)
        self.settings = settings

    @property
    def version(self) -> str:
        try:
            number = (self.path / CURRENT).read_text("utf-8").strip()
        except OSError:
            raise OpenM6Error(f"{self.path} is damaged: {CURRENT} cannot be read.") from None
        if not (self.path / VERSIONS / number / "package").is_dir() or not number.isdigit():
            raise OpenM6Error(f"{self.path} is damaged: it has no version {number[:20]!r}.")
        return number

    @property
    def versions(self) -> list[str]:
        """Numbers of all versions, the oldest first."""
        return sorted(p.name for p in (self.path / VERSIONS).glob("[0-9]*") if (p / "package").is_dir())

    def folder(self, version: str | None = None) -> Path:
        return self.path / VERSIONS / (version or self.version)

    def use(self, version: str) -> None:
        """Let a version answer from now on. Raises UsageError for an unknown one."""
        if version not in self.versions:
            raise UsageError(f"{self.path} has no version {version}. It has: {', '.join(self.versions)}.")
        write_text(self.path / CURRENT, version + "\n")


def read_content(path: Path) -> bytes:
    """The bytes of edge.toml. Raises UsageError where they cannot be read."""
    try:
        return (path / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not an edge device: it has no {FILE}. `openm6 cascade init` makes one.") from None
    except OSError as error:
        raise UsageError(f"{path / FILE} cannot be read ({error.strerror}).") from None
