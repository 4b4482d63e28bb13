"""Errors that a user's mistake raises.

Every message has one or two sentences: the problem, its place (file, line or record, key), the remedy. The command line
prints the message alone and exits with `exit_code`; the SDK lets the exception through."""

import os
from pathlib import Path


class OpenM6Error(Exception):
    """Work that could not be done: exit code 1.

    code     kind of the error in one word, for programs: HTTP status and statistics depend on it, never on
             the words of the message
    param    name of the field or option at fault, where there is one
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str = "", *, code: str | None = None, param: str | None = None):
        super().__init__(_printable(message))
        self.code, self.param = code or type(self).code, param if param is None else _printable(param)


class UsageError(OpenM6Error):
    """An invalid request: unknown key, wrong type, missing slot. Exit code 2."""

    exit_code = 2
    code = "invalid"


class DataError(OpenM6Error):
    """An unusable record, file or picture. Exit code 1."""

    code = "invalid"


class ContextLengthError(UsageError, DataError):
    """A text or prompt of more positions than the model has: an invalid request (exit code 2), and among many records
    an unusable one, which costs itself alone."""

    code = "context_length_exceeded"


def _printable(text: str) -> str:
    """The text with lone surrogates, which can be neither printed nor sent, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def suggest(word: str, known: list[str] | tuple[str, ...] | set[str]) -> str:
    """`' Did you mean "caption"?'` when a known word is close to `word`, else `''`."""
    import difflib

    close = difflib.get_close_matches(word[:100], sorted(known), n=1)  # its time is quadratic in their lengths
    return f' Did you mean "{close[0]}"?' if close else ""


def suggest_path(path: str | Path) -> str:
    """`' Did you mean "runs/goods/model"?'` when something of a similar name exists in the place of `path`."""
    wanted, here = Path(path), Path()
    for part in wanted.parts:
        if (here / part).exists():
            here /= part
            continue
        import difflib

        names = [one.name for one in here.iterdir()] if here.is_dir() and os.access(here, os.R_OK) else []
        close = difflib.get_close_matches(part[:100], sorted(names), n=1)
        if not close:
            return ""
        here /= close[0]
    return "" if here == wanted else f' Did you mean "{here}"?'


def set_once(values: dict[str, str], name: str, value: str) -> None:
    """Add a value from the command line to `values`. Raises UsageError where the name has another value."""
    if values.setdefault(name, value) != value:
        raise UsageError(f'{name} is given twice: "{values[name]}" and "{value}".')


def cut(name: object, length: int = 40) -> str:
    """A name or value of the user as a message shows it: on one line, its first `length` characters."""
    text = " ".join(str(name)[: 100 * length].split())
    return text if len(text) <= length else text[:length] + "..."
