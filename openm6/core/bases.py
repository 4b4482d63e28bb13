"""The base model of an adapter: its directory, found and compared without PyTorch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from openm6.core.errors import OpenM6Error, UsageError, suggest_path

CONFIG = "adapter_config.json"


def require_model(path: Path, file: str = "config.json") -> None:
    """Refuse a directory that does not exist or has no `file`; otherwise libraries would look its name up on the
    network. Raises UsageError."""
    if not path.exists():
        raise UsageError(f"{path} is no model directory: there is no such path.{suggest_path(path)}")
    if not (path / file).is_file():
        raise UsageError(f"{path} is no model directory: it has no {file}.")


def base_of(path: Path) -> Path | None:
    """The model directory of the adapter in `path`; None where `path` holds no adapter. Raises UsageError where the
    base does not exist."""
    if not (path / CONFIG).is_file():
        return None
    base = Path(str(read_adapter_config(path)["base_model_name_or_path"]))
    if not (base / "config.json").is_file():
        raise UsageError(
            f"{path} is an adapter of the model {base}, which is not there. Bring it back, or write where it is now "
            f"into {path / CONFIG} (base_model_name_or_path)."
        )
    return base


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The content of an adapter's configuration. Raises OpenM6Error where it is damaged."""
    try:
        content = json.loads((path / CONFIG).read_text("utf-8"))
        assert isinstance(content["base_model_name_or_path"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise OpenM6Error(f"{path / CONFIG} is damaged.") from None
    return dict(content)


def changed_base(adapter: Path, expected: str) -> str:
    """An error message where the base of an adapter is missing or its `directory_hash` is not the expected one; else
    ""."""
    try:
        base = base_of(adapter)
    except UsageError as error:
        return str(error)
    if base is None or directory_hash(base) == expected:
        return ""
    return (
        f"The model {base}, which the adapter {adapter.name} changes, is not the one that the adapter was trained on: "
        "it has changed since. Bring that model back, or train the adapter anew."
    )


def directory_hash(directory: Path) -> str:
    """SHA-256 of all safetensors and JSON files of a model directory and of an adapter's base: it changes with weights,
    tokenizer and tasks."""
    digest = hashlib.sha256()
    for folder in dict.fromkeys((directory, base_of(directory) or directory)):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()
