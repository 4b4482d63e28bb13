"""A cache of its own for every test, small pictures, and a task that writes down what it was given."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6.core.errors import DataError
from openm6.core.sequence import CAUSAL, Sequence
from openm6.tasks.grammar import Slot


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENM6_CACHE", str(folder))
    return folder


def picture_bytes(value: int = 0, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 100, 200)).save(buffer, format)
    return buffer.getvalue()


def number_slot(name: str, kind: str, drop: float = 0.0) -> Slot:
    return Slot(kind, name, drop=drop)


@dataclass
class NumberTask:
    """The smallest task that the loader can drive; an example (`number_example`) holds the record's number and one
    random draw."""

    name: str = "number"
    slots: Mapping[str, Slot] = field(default_factory=lambda: {"text": number_slot("text", "text")})
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("text",)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def number_example(
    task: NumberTask, record: Mapping[str, Any], processor: Any, rng: np.random.Generator, *_: Any
) -> Sequence:
    if not str(record.get("text", "")).isdigit():
        raise DataError(f"{record['_where']} has no number.")
    ids = np.array([int(record["text"]), int(rng.integers(1 << 30))], np.int32)
    return Sequence(ids, np.full(2, CAUSAL, np.int32), ids, task=task.name)


def numbers(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": str(i), "_where": f"list#{i}"} for i in range(start, start + count)]


def source_package(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installed package that brings a source `name:...`: what stands in the `records` of its module."""
    about = folder / f"{name}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[openm6.sources]\n{name} = source_of_{name}:open_it\n")
    (folder / f"source_of_{name}.py").write_text(
        "from openm6.data.source import Source\nfrom openm6.data.store import ListRecords\n\nrecords = []\n\n\n"
        "def open_it(name, limit):\n    return Source(name, ListRecords(records), limit=limit)\n"
    )
    monkeypatch.syspath_prepend(folder)
    return import_module(f"source_of_{name}")
