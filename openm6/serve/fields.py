"""Fields of a request: its own, fields of OpenAI's API that change nothing here, and fields refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from openm6.core.errors import UsageError, cut, suggest
from openm6.core.files import dumps

Passing = tuple[Any, ...] | None
"""The accepted values of a field that is ignored; None: all values. A null is always accepted."""

ANY: Passing = None


class Fields(BaseModel):
    """The body of a request. A null stands for the default. An ignored field whose value would change the answer is
    refused by name, an unknown field with the nearest known name.

    others   fields of OpenAI's API that are ignored here
    place    the field that holds these ones, with a dot
    """

    model_config = ConfigDict(extra="forbid")

    others: ClassVar[Mapping[str, Passing]] = {}
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """The fields of this model alone. Raises UsageError for others."""
        if not isinstance(values, Mapping):
            return values
        kept = {}
        for name, value in values.items():
            if name not in cls.model_fields:
                cls._check(name, value)
            elif value is not None:
                kept[name] = value
        return kept

    @classmethod
    def _check(cls, name: str, value: Any) -> None:
        param = f"{cls.place}{cut(name)}"
        if name not in cls.others:
            known = [*cls.model_fields, *cls.others]
            raise UsageError(f"There is no field {param}.{suggest(name, known)}", code="unknown_parameter", param=param)
        passing = cls.others[name]
        if value is None or passing is None or value in passing:
            return
        send = f", or send {' or '.join(map(dumps, passing))}" if passing else ""
        shown = cut(value if isinstance(value, str) else dumps(value, default=lambda _: "a file"))
        message = f"The field {param} is not supported with the value {shown}: leave it out{send}."
        raise UsageError(message, code="unsupported_parameter", param=param)
