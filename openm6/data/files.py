"""Files: local paths and fsspec URLs (`s3://`, `hdfs://`, `https://`), globs, retried reads, encodings of texts."""

import codecs
import glob
import gzip
import io
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from openm6.core.errors import DataError, UsageError, suggest_path
from openm6.data.rejects import OnReject, Reject

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
    """Path, size and times of change, of its content and of its entry, of a file, to detect changes."""
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
        self._file = _retried(self._opened, url)

    def _opened(self) -> Any:
        file = self._system.open(self._path, "rb", block_size=2**20)
        if self._place:
            file.seek(self._place)
        return file

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
        def read() -> bytes:
            try:
                return self._file.read(len(buffer))
            except OSError:
                self._file = self._opened()
                raise

        data = _retried(read, self._url)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

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


# Text files: encodings and line ends.

TORN = (EOFError, zlib.error, gzip.BadGzipFile)
"""Exceptions from reading a truncated or damaged .gz file."""

_SAMPLE = 2**20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_UNDECODED = re.compile("[\udc80-\udcff]")
_HANZI = 20
"""Minimum number of Chinese characters in a sample to take it for GB18030."""


def numbered_lines(path: str, on_reject: OnReject, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, each with its end (newline, carriage return, or both).

    Invalid bytes become lone surrogates, which `is_text` detects. A truncated .gz file gives its complete lines, then a
    reject. Raises DataError where the encoding is unclear."""
    codec, number = encoding_of(path, encoding), 0
    try:
        with open_file(path) as file:
            for line in _lines(file, codec):
                number += 1
                yield number, line.removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not {codec} text after line {number}: name its encoding by --encoding.") from None
    except TORN:
        if not number:
            raise DataError(f"{path} is no gzip file, or is damaged at its beginning.") from None
        on_reject(Reject(path, f"{path} is truncated or damaged after line {number}."))


def is_text(line: str) -> bool:
    """Whether all bytes of a line are valid in the file's encoding."""
    return line.isascii() or not _UNDECODED.search(line)


def read_text(path: str, encoding: str | None = None) -> str:
    """A whole text file. Raises DataError for invalid or truncated text."""
    try:
        return read_file(path).decode(encoding_of(path, encoding)).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise DataError(_unknown(path)) from None
    except TORN:
        raise DataError(f"{path} is no gzip file, or is truncated or damaged.") from None


def encoding_of(path: str, encoding: str | None = None) -> str:
    """The codec of a text file: `encoding` if it is given, else detected from its beginning.

    A byte order mark decides, then whether the first MiB is UTF-8, then whether it is Chinese text in GB18030, which is
    logged. A file with lines in UTF-8 and others in another encoding is UTF-8 with bad lines. Raises UsageError for an
    unknown encoding, DataError where none is certain."""
    if encoding is not None:
        try:
            "".encode(encoding)
            return encoding
        except LookupError:
            raise UsageError(
                f"There is no encoding {encoding!r}; usual ones are utf-8, gb18030, big5, utf-16, cp1252."
            ) from None
    sample = b""
    with suppress(*TORN), open_file(path) as file:
        while len(sample) < _SAMPLE and (part := cast(Any, file).read1(2**16)):
            sample += part
    for mark, codec in _MARKS:
        if sample.startswith(mark):
            return codec
    if sample.count(0) * 10 > len(sample):
        order = "be" if sample[::2].count(0) > sample[1::2].count(0) else "le"
        raise DataError(
            f"{path} holds many NUL bytes: if it is UTF-16 without a mark, say so by --encoding utf-16-{order}."
        )
    if _decoded(sample, "utf-8") is not None:
        return "utf-8"
    foreign = [line for line in sample.splitlines() if not line.isascii()]
    if any(max(_decoded(line, "utf-8") or "") >= "\u0800" for line in foreign if _decoded(line, "utf-8")):
        return "utf-8"
    if _is_chinese(_decoded(sample, "gb18030") or ""):
        logging.getLogger("openm6.data").warning(
            "%s is not UTF-8; it is read as GB18030 (another one is named by --encoding).", path
        )
        return "gb18030"
    raise DataError(_unknown(path))


def _unknown(path: str) -> str:
    return (
        f"{path} is not UTF-8 text: save it as UTF-8, or name its encoding by --encoding "
        "(gb18030, big5, utf-16, cp1252; in a recipe, format: '?encoding=gb18030')."
    )


def _decoded(sample: bytes, codec: str) -> str | None:
    """The text of a sample, whose last character may be incomplete."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return None


def _is_chinese(text: str) -> bool:
    """Whether text decoded as GB18030 is Chinese, not text of another encoding: more than nine tenths of its characters
    are then of GB2312's first level (lead bytes B0 to D7, by pinyin), about half of these with a pinyin after R. Big5
    and Japanese decode to rarer characters, Korean to the first half alone."""
    codes = [c.encode("gb18030", "ignore") for c in text if not c.isascii()]
    codes = [c for c in codes if not (len(c) == 2 and 0xA1 <= c[0] <= 0xA3)]  # punctuation and full-width letters
    usual = [c[0] for c in codes if len(c) == 2 and 0xB0 <= c[0] <= 0xD7 and c[1] >= 0xA1]
    late = sum(lead >= 0xC9 for lead in usual)
    return len(usual) >= max(_HANZI, 0.9 * len(codes)) and late >= 0.2 * len(usual)


def _lines(file: Any, codec: str) -> Iterator[str]:
    if codec.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        yield from io.TextIOWrapper(file, codec, newline="")
        return
    for line in file:
        for part in line.splitlines(keepends=True):  # of bytes: \n, \r and \r\n alone
            yield part.decode(codec, "surrogateescape")
