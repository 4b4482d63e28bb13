"""What a command is told about files that do not tell it themselves."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from openm6.cli import commands
from tests.conftest import command


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """The option --no-cache lasts as long as the process: the next test has its cache again."""
    yield
    os.environ.pop("OPENM6_NO_CACHE", None)


def check(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command("data", "check", *words, "--task", "text_denoising", "--json").stdout)
    return found


def test_names_encoding_and_no_cache_of_data_check(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("1,茶葉很香\n2,包裝精美\n".encode("big5"))
    found = check(str(path), "--names", "id,text", "--encoding", "big5", "--no-cache")
    assert (found["good"], found["records"]) == (2, 2)
    assert found["columns"] == {"text": "text"}
    assert found["characters"]["text"] == {"median": 4, "longest": 4}
    assert not list(cache.iterdir())


def test_every_command_that_takes_a_format_takes_what_messages_of_reading_name() -> None:
    options = dict(options_of(typer.main.get_command(commands())))
    del options["models export"]  # whose format is that of what it writes
    takers = {name: found for name, found in options.items() if "--format" in found}
    assert len(takers) > 8
    for name, found in takers.items():
        assert found >= {"--encoding", "--names", "--no-cache"}, name


def options_of(group: Any, name: str = "") -> Iterator[tuple[str, set[str]]]:
    for word, one in getattr(group, "commands", {}).items():
        yield from options_of(one, f"{name} {word}".strip())
    yield name, {option for parameter in group.params for option in parameter.opts}
