"""The errors that a user's mistake raises.

Every message is one sentence or two: what was wrong, where (file, line or record, key), what to do.
The command line prints the message alone and exits with `exit_code`; the SDK lets the exception through.
"""


class OpenM6Error(Exception):
    """Work that could not be done: exit code 1."""

    exit_code = 1


class UsageError(OpenM6Error):
    """A request that cannot be meant: unknown key, wrong type, missing slot. Exit code 2."""

    exit_code = 2


class DataError(OpenM6Error):
    """A record, file or picture that cannot be used. Exit code 1."""


def suggest(word: str, known: list[str] | tuple[str, ...] | set[str]) -> str:
    """`' Did you mean "caption"?'` when a known word is close to `word`, else `''`."""
    import difflib

    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def cut(name: object, length: int = 40) -> str:
    """A name or value of the user's as a message shows it: on one line, its first 40 characters."""
    text = " ".join(str(name).split())
    return text if len(text) <= length else text[:length] + "..."
