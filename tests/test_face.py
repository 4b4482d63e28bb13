"""The documented face of the SDK: its names, their signatures, and that each is imported on first use."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import openm6

NAMES = {
    "AsyncClient", "Candidate", "Client", "ContextLengthError", "DataError", "OpenM6Error", "Session", "Task",
    "UsageError", "__version__", "load",
}  # fmt: skip

SIGNATURES = {
    "load": "(path, device=None, adapters=None)",
    "Task.from_instruction": "(text, name=None, labels=None)",
    "Task.schema": "(self)",
    "Client": "(url='http://127.0.0.1:8000', key=None, *, model=None, timeout=300.0, retries=6, allow_untrained=False)",
    "Client.run": "(self, task, *, decoding=None, adapter=None, examples=(), truncate=None, system=None, "
    "thinking=None, **slots)",
    "Client.draw": "(self, task, *, candidates=1, decoding=None, adapter=None, truncate=None, **slots)",
    "Client.run_many": "(self, task, records, *, decoding=None, adapter=None, at_once=16, truncate=None)",
    "Client.stream": "(self, task, *, decoding=None, adapter=None, truncate=None, **slots)",
    "Client.tasks": "(self)",
    "Client.models": "(self)",
    "model.M6": "(config)",
    "model.ModelConfig.preset": "(name, **changes)",
    "evaluate.evaluate": "(session, task, records, source='', *, examples=(), batch_size=64, decoding=None, "
    "answers=True, metrics=(), on_progress=None, truncate=None)",
}
"""Names below `openm6`, each with its parameters."""


def found(name: str) -> Any:
    value: Any = openm6
    for part in name.split("."):
        value = getattr(value, part)
    return value


def signature(name: str) -> str:
    """The parameters with their defaults, without annotations."""
    of = inspect.signature(found(name))
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in of.parameters.values()]
    return str(of.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_package_has_these_names() -> None:
    assert set(openm6.__all__) == NAMES
    assert all(found(name) is not None for name in NAMES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_name_of_the_face_takes_these_parameters(name: str) -> None:
    assert signature(name) == SIGNATURES[name]


def test_the_network_takes_a_batch_and_gives_its_losses() -> None:
    assert list(inspect.signature(openm6.model.M6.forward).parameters)[:2] == ["self", "batch"]
    assert {"loss", "losses", "hidden"} <= set(inspect.get_annotations(openm6.model.Output))


def test_an_unknown_name_is_an_attribute_error() -> None:
    for module in (openm6, openm6.model, openm6.evaluate):
        with pytest.raises(AttributeError, match=f"module {module.__name__} has no attribute lod"):
            module.lod  # noqa: B018


def test_tasks_the_client_and_the_modules_need_no_pytorch() -> None:
    code = (
        "import sys, openm6; openm6.Task; openm6.Client; openm6.model; openm6.evaluate; openm6.UsageError; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
