"""Text files: encodings and line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from openm6.core.errors import DataError, UsageError
from openm6.data.files import open_file, read_file
from openm6.data.rejects import OnReject, Reject

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
    """Whether text decoded as GB18030 is Chinese, not text of another encoding.

    More than nine tenths of the characters of Chinese text are of GB2312's first level (lead bytes B0 to D7, by
    pinyin), and about half of these have a pinyin after R. Big5 and Japanese decode to rarer ones, Korean to the first
    half alone."""
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
