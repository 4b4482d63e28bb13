"""What the documentation shows can be done as it is shown."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openm6.tasks.file import task_of
from openm6.tasks.grammar import parse
from openm6.tasks.library import names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@ALL
def test_recipes_and_task_files_are_valid(page: Path) -> None:
    from openm6.train.recipe import check_recipe

    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if "instructions" in content:
            task_of({"name": "shown", **content}, page.name)
        else:
            # A page may show a part of a recipe.
            whole = {"name": "shown", "output": "runs/shown", "model": {"preset": "demo"}, "train": {"steps": 1}}
            check_recipe({**whole, **content}, page.name)


def test_instructions_can_be_parsed() -> None:
    shown = [
        line.split("(planned)")[0].rstrip()
        for page in PAGES
        for block in blocks(page, "text")
        for line in block.splitlines()
        if line.startswith(("[", "-> [")) and " -> [" in f" {line}"
    ]
    assert len(shown) > 10
    for line in shown:
        assert parse(line).target


def test_commands_and_their_options_exist() -> None:
    from typer.core import TyperGroup
    from typer.main import get_command

    from openm6.cli import commands

    shown = {
        line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if "openm6 " in line
    }
    ran = 0
    for line in sorted(shown):
        program, *words = shlex.split(line, comments=True)
        if not program.endswith("openm6"):
            continue
        command = get_command(commands())
        while isinstance(command, TyperGroup):
            while words and words[0].startswith("-"):  # an option of the program itself, with its value
                assert words[0] in {option for parameter in command.params for option in parameter.opts}, line
                words = words[2:]
            assert words and words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        if (command.context_settings or {}).get("ignore_unknown_options"):  # another command follows
            continue
        assert {word for word in words if word.startswith("-")} <= known, line
        ran += 1
    assert ran > 10


@ALL
def test_python_examples_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_metrics_that_are_shown_measure(tmp_path: Path) -> None:
    from openm6.extend import load_extension
    from openm6.tasks.metrics import METRICS, score

    before = dict(METRICS)
    try:
        for block in blocks(ROOT / "docs" / "extending.md", "python"):
            if "def " in block and "register_metric(" in block:
                (tmp_path / "mine.py").write_text(block, "utf-8")
                load_extension(tmp_path / "mine.py")
        added = METRICS.keys() - before
        said, wanted = ["差评", "好评", "差评", "差评"], [["差评"], ["差评"], ["好评"], ["差评"]]
        found = {name: score(name, said, wanted).value for name in added}
    finally:
        METRICS.clear()
        METRICS.update(before)
    assert found == {"f1_of_complaints": pytest.approx(2 / 3), "no_longer": 1.0}


def test_every_task_of_the_library_is_listed(hooks: None) -> None:
    from gen_tasks import task_table

    rows = task_table().splitlines()[2:]
    assert len(rows) == len(names())
    for name in names():
        assert any(row.startswith(f"| `{name}`<br>") for row in rows)


def test_every_key_of_a_recipe_is_listed(hooks: None) -> None:
    from gen_recipe import recipe_tables

    from openm6.train.recipe import Recipe, TrainSection

    keys = re.findall(r"^\| `(\w+)` \|", recipe_tables(), re.M)
    assert set(keys) >= {*Recipe.model_fields, *TrainSection.model_fields}


def test_benchmark_results_become_tables(hooks: None, tmp_path: Path) -> None:
    from gen_benchmarks import benchmark_tables

    assert "no results yet" in benchmark_tables(tmp_path)
    content = {"name": "a", "machine": "m", "date": "2026-01-02", "rows": [{"x": 1234, "y": 0.51234}, {"x": "<b>|"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    table = benchmark_tables(tmp_path)
    assert "| 1,234 | 0.512 |" in table
    assert "| &lt;b&gt;&#124; |  |" in table


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tasks" / "index.html").read_text("utf-8").count("<code>vqa</code>") > 0


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators beside the pages can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
