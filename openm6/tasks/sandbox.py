"""Chat templates as the programs that they are, in Jinja: they come from a model's directory alone, and run in
transformers' sandbox, with a bound on their time, their memory and what they write."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from datetime import date as Date
from functools import lru_cache
from types import FrameType
from typing import Any

from openm6.core.errors import DataError, OpenM6Error, cut

SOURCE_LIMIT, OUTPUT_LIMIT = 2**18, 2**24
"""Characters of a template, and of what it writes, at most."""

SECONDS, BYTES = 2.0, 2**29
"""Time of the processor and memory that a template may take for a conversation."""


@lru_cache(maxsize=16)
def compiled_template(template: str, date: str) -> Any:
    from jinja2 import TemplateError

    try:
        day = Date.fromisoformat(date)
        return _environment().from_string(template, globals={"strftime_now": lambda form: day.strftime(form)})
    except (TemplateError, RecursionError) as error:
        raise OpenM6Error(f"The chat template is damaged: {cut(str(error))}.") from None


def _environment() -> Any:
    """transformers' sandbox for chat templates. On an edge device, which has only the template that was exported with
    its model, Jinja's sandbox with the same settings."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template("").environment
    except ImportError:
        from jinja2 import TemplateError, ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    made.globals["raise_exception"] = refuse
    return made


def run_template(template: str, date: str, values: Mapping[str, Any]) -> str:
    """What a template writes; `date`: the day that it may ask for, ISO 8601.

    Raises DataError, with its reason, where it refuses the values or takes too much, OpenM6Error for a damaged one."""
    compiled = compiled_template(template, date)
    bound, before = _Bound(), sys.gettrace()
    written: list[str] = []
    sys.settrace(bound.trace)  # of this thread alone
    try:
        size = 0
        for part in compiled.generate(**values):
            written.append(part)
            size += len(part)
            if size > OUTPUT_LIMIT:
                raise _Exceeded(f"writes more than {OUTPUT_LIMIT:,} characters")
    except _Exceeded as error:
        raise DataError(f"The model's chat template {error}.") from None
    except Exception as error:  # a template can raise anything
        reason = cut(str(error).rstrip(".") or repr(error))
        raise DataError(f"The model's chat template refuses the messages: {reason}.") from None
    finally:
        sys.settrace(before)
    return "".join(written)


class _Exceeded(BaseException):
    """A template takes more than it may. No Exception, which a template could not catch, but its filters might."""


class _Bound:
    """Ends a template after each of whose lines it has taken too much. One call of the library is not interrupted."""

    def __init__(self) -> None:
        self._until = time.thread_time() + SECONDS
        self._most = _memory() + BYTES

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > self._until:
            raise _Exceeded(f"takes longer than {SECONDS:g} s")
        if _memory() > self._most:
            raise _Exceeded(f"takes more than {BYTES // 2**20} MiB of memory")
        return self.trace


def _memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
