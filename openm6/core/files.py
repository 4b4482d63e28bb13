"""Atomic writes of files and directories (after a kill or on a full disk too), and JSON lines.

Only a newline ends a line of JSON lines or of server-sent events. `str.splitlines`, and clients that use it (httpx),
also end one at U+0085, U+2028 and U+2029, which JSON leaves as they are in a text: the writer escapes them, and the
reader splits at newlines alone."""

import base64
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from openm6.core.errors import DataError, OpenM6Error, UsageError


def write_whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a directory that appears at `target` complete, or not at all.
    Raises OpenM6Error when the disk is full or not writable; previous content of `target` then stays."""
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
    """Let `fill` write a file that replaces `target` complete, or not at all."""
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
    """Write a text like `write_file`, in UTF-8."""
    write_file(target, lambda draft: draft.write_text(text, "utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON like `write_file`."""
    write_text(target, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def sync(file: IO[Any]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, without its newline, from a file of lines, so that more can be appended."""
    if path.is_file():
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < path.stat().st_size:
            os.truncate(path, whole)


def whole_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines that is appended to, without an incomplete last line, which is being written
    or was interrupted. A missing file is empty.

    Raises DataError for any other line that is not JSON."""
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
    """Lock a file or directory against other processes, by a lock on a file beside it. The system frees the lock when
    the process ends.

    Raises UsageError where another process holds it, OpenM6Error where the place is not writable."""
    import fcntl  # Unix only

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
    """Refuse, before any work, a target that exists or cannot be written."""
    if target.exists():
        raise UsageError(f"{target} exists already: name another directory.")
    require_writable(target)


def require_writable(folder: Path) -> None:
    """Refuse, before any work, a folder (or its nearest existing parent) in which no file can be created. A file is
    created as a trial: neither permissions nor a read-only mount tell for sure."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"Nothing can be written to {folder} ({_reason(error)}): name another place.") from None


def publish(draft: Path, target: Path) -> None:
    """Move a complete directory to its place, instead of an older one, after it is on the disk."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        for path in (*draft.rglob("*"), draft):
            _flush_entry(path)
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


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
_BYTES = "__base64__"


def dumps(value: Any, default: Callable[[Any], Any] | None = None, allow_nan: bool = True) -> str:
    """A value as JSON on one line, without the newline; `default` (such as `plain`) converts other types. Raises
    ValueError for NaN and Infinity where they are not allowed."""
    return json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan).translate(_ENDS)


def plain(value: Any) -> Any:
    """Convert a value for JSON: bytes to an object with base64, which `loads` decodes; numpy values to numbers and
    lists; anything else, such as dates, to text."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def loads(text: str | bytes) -> Any:
    """Read JSON that was written with `plain`, with bytes decoded."""
    held = _BYTES in text if isinstance(text, str) else _BYTES.encode() in text
    return json.loads(text, object_hook=_opened if held else None)  # a hook is slow


def _opened(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES]) if value.keys() == {_BYTES} else value


def lines_of(text: str) -> list[str]:
    """Non-empty lines."""
    return [line for line in text.split("\n") if line.strip()]


DEPTH = 100
"""Maximum nesting of lists and objects."""

_DEEP = f"nests more than {DEPTH} levels"
_MARK = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.S)  # an unterminated text is one too

_SURROGATE = re.compile("[\ud800-\udfff]")


def require_format(file: Path, found: object, known: int) -> None:
    """Raises OpenM6Error for a file of another format than the `known` one."""
    if found != known:
        raise OpenM6Error(f"{file} has the format {found!r}; this version of OpenM6 reads {known}.")


@dataclass(frozen=True, slots=True)
class Fault:
    """Placeholder in a parsed value for a part that cannot be used."""

    reason: str


def parse(text: str) -> Any:
    """Parse JSON from outside; a number, constant or object that cannot be used becomes a Fault, which `fault_of`
    finds.

    An element of a list that nests too deeply becomes a Fault too. Raises json.JSONDecodeError for invalid JSON,
    ValueError where anything else nests too deeply."""
    try:
        return _read_json(text)
    except RecursionError:
        if not text.lstrip().startswith("["):
            raise ValueError(_DEEP) from None
    found: list[Any] = []
    for start, end in _elements(text):
        try:
            found.append(_read_json(text[start:end]))
        except RecursionError:
            found.append(Fault(_DEEP))
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, text, start + error.pos) from None
    return found


def has_more_values(text: str, most: int) -> bool:
    """True if a JSON text has more than `most` values, by the number of its commas and brackets; it is not parsed."""
    if sum(map(text.count, ",[{")) <= most:
        return False
    marks = (mark for mark in _MARK.finditer(text) if mark[0] in (",", "[", "{"))
    return next(islice(marks, most, None), None) is not None


def _read_json(text: str) -> Any:
    def constant(name: str) -> Fault:
        return Fault(f"holds {name}, which JSON does not know")

    return json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=constant, object_pairs_hook=_unique)


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the elements of a list, without recursion."""
    depth = start = end = 0
    for mark in _MARK.finditer(text):
        if mark[0] in ("]", "}", ",") and depth == 1:
            yield start, mark.start()
        if mark[0] in ("[", "{"):
            depth += 1
        elif mark[0] in ("]", "}"):
            depth -= 1
        if depth <= 1 and mark[0] in ("[", ","):
            start = mark.end()
        if depth == 0:
            end = mark.end()
            break
    if not end or text[end - 1] != "]" or text[end:].strip():
        raise json.JSONDecodeError("The list does not end as a list", text, end or len(text))


def fault_of(value: Any) -> str | None:
    """The reason why a parsed value cannot be used, as a verb with its object; None where it can. Reasons are lone
    surrogates, numbers that are too large, NaN and Infinity, a duplicate key, more than 100 levels."""
    rest = [(value, 0)]
    while rest:
        one, depth = rest.pop()
        if isinstance(one, str):
            if not one.isascii() and _SURROGATE.search(one):
                return "holds half a character (a lone surrogate such as \\ud83d)"
        elif isinstance(one, Fault):
            return one.reason
        elif isinstance(one, (dict, list)):
            if depth == DEPTH:
                return _DEEP
            rest += [(part, depth + 1) for part in one]
            if isinstance(one, dict):
                rest += [(part, depth + 1) for part in one.values()]
    return None


def _integer(digits: str) -> int | Fault:
    return int(digits) if len(digits) <= 1000 else Fault(f"holds a number of {len(digits)} digits")


def _float(digits: str) -> float | Fault:
    value = float(digits)
    return value if math.isfinite(value) else Fault(f"holds a number that is too large ({digits[:40]})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return Fault(f"names the key {twice[:40]!r} twice")
    return found
