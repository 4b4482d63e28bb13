"""Opening the answer store of an edge device. A device that answers opens it in any case (`open_store`): a damaged file
is set aside, and where the disk refuses, nothing is stored.

Where the disk may hold more than the settings allow, and that cannot be changed, the device refuses to start. The
header of a file says what it holds at most, and outlives most damage."""

from __future__ import annotations

import logging
import os
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from openm6.core.errors import UsageError
from openm6.edge.answer_store import ENCRYPTED, STORE, AnswerStore, StoreError, parts, promise
from openm6.edge.device import ALL, MODES, NOTHING, Settings

log = logging.getLogger("openm6.edge")


def open_answer_store(folder: Path, settings: Settings, read_only: bool = False) -> AnswerStore:
    """The answer store of an edge device. `read_only`: unchanged; nothing is created, repaired, deleted or encrypted.
    Raises UsageError for a missing key of the encryption, StoreError where the disk refuses, and InterruptedWriteError
    for a file to be read that has to be repaired first."""
    key, file = None, folder / STORE
    if settings.encrypt and settings.privacy != NOTHING:
        key = os.environ.get(settings.encrypt)
        if not key:
            raise UsageError(
                f"The answer store is encrypted with the key in ${settings.encrypt}, which is not set. "
                "`openm6-edge new-key` makes one."
            )
    is_none = read_only and (not file.exists() or (file.is_file() and not file.stat().st_size))
    return AnswerStore(None if is_none else file, settings.privacy, settings.keep_mb * 2**20, key, read_only)


def open_store(folder: Path, settings: Settings) -> AnswerStore:
    """The answer store; where the disk refuses, one in memory that stores nothing (`trouble` says why). A damaged file
    is renamed. Raises UsageError as `open_answer_store` does, and StoreError where a file that cannot be changed may
    hold what the settings forbid."""
    file = folder / STORE
    check_set_aside(folder, settings)
    try:
        return open_answer_store(folder, settings)
    except StoreError as error:
        _check_promise(file, settings, str(error))
        failure = error
    try:
        if failure.is_damaged:
            log.error("%s It is now named %s", failure, _move_aside(file).name)
            return open_answer_store(folder, settings)
    except (OSError, StoreError) as error:
        failure = StoreError(f"{file} is damaged, and a new one cannot be begun ({error}).")
    found = AnswerStore(None, NOTHING, 0)
    found.trouble = f"Nothing is stored: {failure}"
    log.error("%s", found.trouble)
    return found


def store_summary(folder: Path, kept: AnswerStore | None = None) -> dict[str, Any]:
    """State of an edge device's answer store, of `kept` or of the file itself, which needs no key. Raises nothing:
    `trouble` names a problem."""
    summary: dict[str, Any] = {"answers": {}, "bytes": 0, "trouble": ""}
    try:
        reader = nullcontext(kept) if kept else closing(open_answer_store(folder, Settings(privacy=NOTHING), True))
        with reader as store:
            summary["trouble"] = store.trouble
            summary |= {"answers": store.counts(), "bytes": store.size()}
    except StoreError as error:
        summary["trouble"] = str(error)
    return {**summary, "set_aside": [one.name for one in set_aside(folder / STORE)]}


def set_aside(file: Path) -> list[Path]:
    """Damaged files that were renamed (`open_store`)."""
    return sorted(one for one in file.parent.glob(f"{file.name}.damaged-*") if one.name.rpartition("-")[2].isdigit())


def check_set_aside(folder: Path, settings: Settings) -> None:
    """Raises StoreError where a file that was set aside may hold what the settings forbid."""
    for one in set_aside(folder / STORE):
        _check_promise(one, settings, f"{one} is damaged.")


def _check_promise(file: Path, settings: Settings, why: str) -> None:
    """Raises StoreError for a file that may hold what the settings forbid; a missing or empty one cannot."""
    wanted = promise(settings.privacy, bool(settings.encrypt) and settings.privacy != NOTHING)
    if wanted == promise(ALL, False):
        return
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
    except FileNotFoundError:
        return
    except OSError:
        head = b"unknown"
    promised = int.from_bytes(head[60:64], "big") if head.startswith(b"SQLite format 3") else 0
    mode, is_encrypted = (promised - 1) % ENCRYPTED, promised > ENCRYPTED
    if head and not (
        0 < promised < 2 * ENCRYPTED and mode >= MODES.index(settings.privacy) and is_encrypted >= (wanted > ENCRYPTED)
    ):
        wish = f"privacy = {settings.privacy}" if settings.privacy != ALL else f"encrypt = {settings.encrypt}"
        raise StoreError(
            f"{why} It may hold answers that {wish} forbids on the disk: mend the disk or delete the file."
        )


def _move_aside(file: Path) -> Path:
    """Rename a damaged file and those beside it. Raises OSError."""
    number = 1
    while (place := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    for one in reversed(parts(file)):  # the file itself last: until then the next start finds it damaged again
        one.rename(place.with_name(place.name + one.name.removeprefix(file.name)))
    return place
