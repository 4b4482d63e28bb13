"""The settings of an edge device in use. box.toml is read again for every request, which takes microseconds, so that a
change holds from the next request on; stores and connections that the old settings opened write and send nothing more.

An invalid box.toml (no TOML, a refused value, a key that is missing because the file is being written) may have been
meant to be stricter: until it is corrected nothing is sent and nothing more is stored. Stored answers and the other
settings stay as they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from threading import RLock
from typing import Any

from openm6.core.errors import OpenM6Error, UsageError
from openm6.edge.box import EYES, FILE, Box, read_content
from openm6.edge.cloud import Cloud, CloudError
from openm6.edge.kept import AnswerStore
from openm6.edge.opening import open_store
from openm6.edge.runner import Eyes
from openm6.edge.settings import FEATURES, Settings, settings_in, values_in

RETRY = 1.0
"""Seconds between two tries to apply an invalid box.toml."""
STORED = ("privacy", "encrypt", "keep_mb")
"""Settings with which the answer store is opened."""
log = logging.getLogger("openm6.edge")


@dataclass(frozen=True, slots=True)
class ActiveSettings:
    """Settings, and the store, cloud and image encoder opened by them. `cloud` is None where nothing may be sent,
    `eyes` where no features are. `problem`: why box.toml cannot be used."""

    settings: Settings
    kept: AnswerStore
    cloud: Cloud | None
    eyes: Eyes | None
    problem: str = ""


class LiveSettings:
    """The present settings of an edge device, for several threads."""

    def __init__(self, box: Box, threads: int = 0):
        """Raises UsageError or OpenM6Error where the store or the image encoder cannot be opened."""
        self._box, self._threads, self._lock = box, threads, RLock()
        self._content: bytes | None = box.content
        self._keys = values_in(box.path / FILE, box.content).keys()
        self._tried = 0.0
        self._replaced: list[AnswerStore] = []  # other threads may still read from them
        kept = open_store(box.path, box.settings)
        self._now = ActiveSettings(box.settings, kept, self._cloud(box.settings), self._eyes(box.settings, None))

    def close(self) -> None:
        with self._lock:
            if self._now.cloud is not None:
                self._now.cloud.close()
            for kept in (*self._replaced, self._now.kept):
                kept.close()

    def follow(self) -> ActiveSettings:
        """The settings in force, after applying box.toml if it has changed."""
        with self._lock:
            try:
                content, problem = read_content(self._box.path), ""
            except UsageError as error:
                content, problem = None, str(error)
            again = self._now.problem and time.monotonic() - self._tried > RETRY
            if content != self._content or again:
                self._content, self._tried = content, time.monotonic()
                try:
                    if content is None:
                        raise UsageError(problem)
                    self._take_up(content)
                except (OpenM6Error, OSError) as error:
                    self._stop_sending(str(error))
            return self._now

    def _take_up(self, content: bytes) -> None:
        """Apply box.toml. Raises UsageError or OpenM6Error for one that cannot be used."""
        file, before = self._box.path / FILE, self._now
        values = values_in(file, content)
        settings = settings_in(file, values)
        if gone := sorted(self._keys - values.keys()):
            raise UsageError(f"{file} no longer has {', '.join(gone)}: restore it, or restart the device without it.")
        if before.cloud is not None:
            before.cloud.close()
        eyes, kept = self._eyes(settings, before.eyes), before.kept
        if before.problem or any(getattr(settings, name) != getattr(before.settings, name) for name in STORED):
            kept.revoke()
            kept = open_store(self._box.path, settings)
            self._replaced.append(before.kept)
        self._now = ActiveSettings(settings, kept, self._cloud(settings), eyes)
        self._keys = values.keys()
        log.info("%s is applied: %s", FILE, _changes(before.settings, settings) or "nothing is different")

    def _stop_sending(self, problem: str) -> None:
        before = self._now
        if before.cloud is not None:
            before.cloud.close()
        before.kept.revoke()
        self._now = replace(before, cloud=None, problem=problem)
        if problem != before.problem:
            log.error("Nothing is sent or stored until %s can be used: %s", FILE, problem)

    def _cloud(self, settings: Settings) -> Cloud | None:
        if not settings.asks_cloud:
            return None

        def check() -> None:
            if self.follow().cloud is not made:
                raise CloudError("changed")

        made = Cloud(settings.cloud, settings.cloud_key, settings.model, check=check)
        return made

    def _eyes(self, settings: Settings, opened: Eyes | None) -> Eyes | None:
        path = self._box.path / EYES
        if settings.privacy != FEATURES:
            return None
        return opened or (Eyes(path, self._threads) if path.is_dir() else None)


def _changes(before: Settings, after: Settings) -> str:
    old: Mapping[str, Any] = asdict(before)
    return ", ".join(f"{name} {old[name]!r} -> {one!r}" for name, one in asdict(after).items() if one != old[name])
