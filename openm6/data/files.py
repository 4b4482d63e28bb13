"""Local and remote files: local paths and fsspec URLs (`s3://`, `hdfs://`, `https://`), globs, retried reads."""

from __future__ import annotations

import glob
import gzip
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from openm6.core.errors import DataError, UsageError, suggest_path

ATTEMPTS = 3
_WAIT = 0.2  # seconds before the second attempt; four times as long before the third

T = TypeVar("T")


def is_remote(path: str) -> bool:
    return "://" in path


def folder_of(path: str) -> str:
    """The folder of a file, from which its relative picture paths start."""
    return path.rsplit("/", 1)[0] if is_remote(path) else str(Path(path).parent)


def join(folder: str, name: str) -> str:
    """`name` inside `folder`; an absolute local name is returned unchanged.

    Raises DataError where a remote name leads out of its folder."""
    if not is_remote(folder):
        return str(Path(folder) / name)
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"The path {name} leads out of {folder}: only paths below it are read.")
    return f"{folder.rstrip('/')}/{name}"


def expand(spec: str) -> list[str]:
    """The files of a path, URL or glob, sorted. Raises DataError when there is none."""
    if is_remote(spec):
        found = [spec]
        if any(c in spec for c in "*["):
            system, path = filesystem(spec)
            found = [str(system.unstrip_protocol(p)) for p in _retried(lambda: system.glob(path), spec)]
    else:
        found = [spec] if Path(spec).exists() else glob.glob(spec, recursive=True)
    if not found:
        raise DataError(
            f"There is no file {spec}: check the path (it is looked for from {Path.cwd()}).{suggest_path(spec)}"
        )
    return sorted(found)


def absolute(path: str) -> str:
    """An absolute local path, which is the same wherever a command is run."""
    return path if is_remote(path) else str(Path(path).absolute())


def is_clutter(name: str) -> bool:
    """Whether a file in a folder or archive is not the user's: hidden, or made by macOS or tar."""
    parts = name.split("/")
    return any((part.startswith(".") and part.strip(".") != "") or part == "__MACOSX" for part in parts) or any(
        part.startswith("PaxHeader") for part in parts[:-1]
    )


def is_folder(path: str) -> bool:
    if is_remote(path):
        system, inner = filesystem(path)
        return bool(_retried(lambda: system.isdir(inner), path))
    return Path(path).is_dir()


def list_folder(folder: str) -> list[str]:
    """All files below a folder, sorted, without hidden files and those of `is_clutter`."""
    if is_remote(folder):
        system, inner = filesystem(folder)
        names = [str(system.unstrip_protocol(p)) for p in _retried(lambda: system.find(inner), folder)]
    else:
        names = [str(p) for p in Path(folder).rglob("*") if p.is_file()]
    start = len(str(system.unstrip_protocol(inner)) if is_remote(folder) else str(Path(folder)))
    return sorted(n for n in names if not is_clutter(n[start:].lstrip("/")))


def open_file(path: str) -> BinaryIO:
    """Open a file for reading bytes, decompressed when its name ends in .gz. Reads of remote files are retried.

    Raises DataError when it cannot be opened."""
    raw: BinaryIO
    if is_remote(path):
        raw = cast(BinaryIO, io.BufferedReader(_Remote(path), 2**20))
    else:
        try:
            raw = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.lower().endswith(".gz") else raw


def read_file(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()


def fingerprint(path: str) -> list[Any]:
    """Path, size and times of change of a file, to detect changes (of its content, and of its entry, which a copy that
    preserves the former renews)."""
    if is_remote(path):
        system, inner = filesystem(path)
        info = _retried(lambda: system.info(inner), path)
        marks = [info.get(k) for k in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")]
        return [path, info.get("size"), *[str(m) for m in marks if m is not None]]
    status = Path(path).stat()
    return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises UsageError for an unknown one."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url} needs a package that is not installed: {error}.") from None
    except ValueError:
        raise UsageError(
            f"{url} has a protocol that is not known here; use s3://, gs://, hdfs://, https:// or a path."
        ) from None


class _Remote(io.RawIOBase):
    """A remote file that is opened again at the same position when reading fails."""

    def __init__(self, url: str):
        self._url, self._place = url, 0
        self._system, self._path = filesystem(url)
        self._file = self._try(lambda: self._system.open(self._path, "rb", block_size=2**20))

    def _try(self, action: Callable[[], T]) -> T:
        return _retried(action, self._url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = self._file.seek(offset, whence)
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer)

        def read() -> bytes:
            try:
                return self._file.read(wanted)
            except OSError:
                self._reopen()
                raise

        data = self._try(read)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _reopen(self) -> None:
        file = self._system.open(self._path, "rb", block_size=2**20)
        if self._place:
            file.seek(self._place)
        self._file = file

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _retried(action: Callable[[], T], name: str) -> T:
    """The result of a remote read, tried up to three times. Raises DataError after the last failure."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise DataError(f"{name} cannot be read ({type(error).__name__}).") from None
        except OSError as error:
            if attempt + 1 == ATTEMPTS:
                raise DataError(f"{name} could not be read in {ATTEMPTS} attempts ({type(error).__name__}).") from None
            time.sleep(_WAIT * 4**attempt)
    raise AssertionError("unreachable")
