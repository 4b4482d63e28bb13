"""Directories and files that appear whole or not at all, after a kill or on a full disk too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from openm6.errors import DataError, OpenM6Error, UsageError


def write_whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a directory that appears at `target` complete, or not at all.

    Raises OpenM6Error when the disk is full or not writable; what stood at `target` before stays.
    """
    from safetensors import SafetensorError

    draft = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        fill(draft)
        publish(draft, target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise write_failed(target, error) from None
        raise


def write_file(target: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file that takes the place of `target` complete, or not at all."""
    draft = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        fill(draft)
        _flush_entry(draft)
        draft.replace(target)
        _flush_entry(target.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """As `write_file`, in UTF-8."""
    write_file(target, lambda draft: draft.write_text(text, "utf-8"))


def write_json(target: Path, value: Any) -> None:
    """As `write_file`, for people to read."""
    write_text(target, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def sync(file: IO[Any]) -> None:
    """Flush what was appended to an open file to the disk, for lines that a later start relies on."""
    file.flush()
    os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Cut off the end of a file of lines that a kill has left without its newline, so that more can be appended."""
    if path.is_file():
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < path.stat().st_size:
            os.truncate(path, whole)


def whole_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines that is appended to; a last line without its newline is left out: it is being
    written, or a kill has torn it. A missing file is empty.

    Raises DataError for any other line that is no JSON."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                raise DataError(f"{path}:{number} is damaged (no valid JSON): mend the line or delete it.") from None
            yield value


@contextmanager
def lock_output(target: Path) -> Iterator[None]:
    """Keep other processes from writing the same file or directory, by a lock on a file beside it. The system frees the
    lock when the process ends, however it ends.

    Raises UsageError where another process holds it, OpenM6Error where the place is not writable.
    """
    import fcntl  # Unix alone has it

    target = target.resolve()
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise UsageError(
                    f"{target} is being written by another process: wait for its end, or name another output."
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    break
            os.close(handle)  # the process that held the lock has removed its file in the meantime
    except OSError as error:
        raise write_failed(target, error) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def require_new(target: Path) -> None:
    """Refuse, before any work, to write over something, or where nothing can be written."""
    if target.exists():
        raise UsageError(f"{target} exists already: name another directory.")
    require_writable(target)


def require_writable(folder: Path) -> None:
    """Refuse, before any work, a folder in which no file can be made; one that is not there yet is looked for above.
    A file is tried, because neither permissions nor a mount that is read-only tell all of it."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"Nothing can be written to {folder} ({_reason(error)}): name another place.") from None


def publish(draft: Path, target: Path) -> None:
    """Put a complete directory where it belongs, in the place of an older one, after it is on the disk."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        _flush(draft)
        if target.exists():
            target.rename(old)
        draft.rename(target)
        _flush_entry(target.parent)
    except OSError:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_failed(target: Path, error: BaseException) -> OpenM6Error:
    return OpenM6Error(f"{target} could not be written ({_reason(error)}); what was saved before is untouched.")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "no space left on the device" if "No space" in str(error) else "the disk refused"


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush_entry(path)
    _flush_entry(directory)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
