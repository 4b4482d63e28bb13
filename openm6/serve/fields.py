"""Which fields a request may have: its own, those that change nothing here, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from openm6.core.errors import cut, suggest
from openm6.core.files import dumps
from openm6.serve.guard import Refusal

Passing = tuple[Any, ...] | None
"""The values that pass of a field that is not read; None: every value passes. A null always does."""

ANY: Passing = None


class Fields(BaseModel):
    """The body of a request. A null stands for the default. A field that is not read, but would change the answer, is
    refused by its name, and an unknown field with the nearest known name.

    others   fields of OpenAI's API that are not read here
    place    the field that holds these ones, with a dot
    """

    model_config = ConfigDict(extra="forbid")

    others: ClassVar[Mapping[str, Passing]] = {}
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """Only the own fields. Raises Refusal (400)."""
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
            raise Refusal(400, f"There is no field {param}.{suggest(name, known)}", "unknown_parameter", param=param)
        passing = cls.others[name]
        if value is None or passing is None or value in passing:
            return
        send = f", or send {' or '.join(map(dumps, passing))}" if passing else ""
        shown = cut(value if isinstance(value, str) else dumps(value, default=lambda _: "a file"))
        message = f"The field {param} is not supported with the value {shown}: leave it out{send}."
        raise Refusal(400, message, "unsupported_parameter", param=param)
