"""The settings of an edge device in use. edge.toml is read again for every request, which takes microseconds, so that a
change holds from the next request on; stores and connections that the old settings opened write and send nothing more.

An invalid edge.toml (no TOML, a refused value, a key that is missing because the file is being written) may have been
meant to be stricter: until it is corrected nothing is sent and nothing more is stored. Stored answers and the other
settings stay as they were.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from threading import RLock

from openm6.core.errors import OpenM6Error, UsageError
from openm6.edge.answer_store import AnswerStore
from openm6.edge.cloud import Cloud, CloudError
from openm6.edge.device import FEATURES, FILE, IMAGE_ENCODER, EdgeDevice, Settings, parse_settings, read_content
from openm6.edge.opening import open_store
from openm6.edge.runner import ImageEncoder

RETRY = 1.0
"""Seconds between two tries to apply an invalid edge.toml."""
log = logging.getLogger("openm6.edge")


@dataclass(frozen=True, slots=True)
class ActiveSettings:
    """Settings, and the store, cloud and image encoder opened by them. `cloud` is None where nothing may be sent,
    `image_encoder` where no features are. `problem`: why edge.toml cannot be used."""

    settings: Settings
    kept: AnswerStore
    cloud: Cloud | None
    image_encoder: ImageEncoder | None
    problem: str = ""


class LiveSettings:
    """The present settings of an edge device, for several threads."""

    def __init__(self, device: EdgeDevice, threads: int = 0):
        """Raises UsageError or OpenM6Error where the store or the image encoder cannot be opened."""
        self._path, self._threads, self._lock = device.path, threads, RLock()
        self._content: bytes | None = device.content
        self._keys, self._tried = device.keys, 0.0
        self._replaced: list[AnswerStore] = []  # other threads may still read from them
        settings = device.settings
        kept = open_store(self._path, settings)
        self._now = ActiveSettings(settings, kept, self._cloud(settings), self._image_encoder(settings, None))

    def close(self) -> None:
        with self._lock:
            if self._now.cloud is not None:
                self._now.cloud.close()
            for kept in (*self._replaced, self._now.kept):
                kept.close()

    def follow(self) -> ActiveSettings:
        """The settings in force, after applying edge.toml if it has changed."""
        with self._lock:
            try:
                content, problem = read_content(self._path), ""
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
        """Apply edge.toml. Raises UsageError or OpenM6Error for one that cannot be used."""
        file, before = self._path / FILE, self._now
        settings, keys = parse_settings(file, content)
        if gone := sorted(self._keys - keys):
            raise UsageError(f"{file} no longer has {', '.join(gone)}: restore it, or restart the device without it.")
        if before.cloud is not None:
            before.cloud.close()
        image_encoder, kept = self._image_encoder(settings, before.image_encoder), before.kept
        of_store = ("privacy", "encrypt", "keep_mb")  # settings with which it is opened
        if before.problem or any(getattr(settings, name) != getattr(before.settings, name) for name in of_store):
            kept.revoke()
            kept = open_store(self._path, settings)
            self._replaced.append(before.kept)
        self._now = ActiveSettings(settings, kept, self._cloud(settings), image_encoder)
        self._keys = keys
        old, new = asdict(before.settings), asdict(settings)
        changes = ", ".join(f"{name} {old[name]!r} -> {one!r}" for name, one in new.items() if one != old[name])
        log.info("%s is applied: %s", FILE, changes or "nothing is different")

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

    def _image_encoder(self, settings: Settings, opened: ImageEncoder | None) -> ImageEncoder | None:
        if settings.privacy != FEATURES:
            return None
        path = self._path / IMAGE_ENCODER
        return opened or (ImageEncoder(path, self._threads) if path.is_dir() else None)
