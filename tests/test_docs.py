"""What the documentation shows can be done as it is shown."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer._click.exceptions import UsageError
from typer.core import TyperGroup
from typer.main import get_command

import openm6
from openm6.cli import commands
from openm6.inference.session import Session
from openm6.tasks.grammar import parse
from openm6.tasks.library import get as get_task, names, task_from_dict
from tests.conftest import drawing_session

ROOT = Path(__file__).parents[1]
SCENARIOS = sorted((ROOT / "docs" / "scenarios").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md")), *SCENARIOS]
EVERY_PAGE = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "reproduce").glob("*.md"))]


def page_id(page: Path) -> str:
    return f"scenarios-{page.stem}" if page in SCENARIOS else page.stem


ALL = pytest.mark.parametrize("page", PAGES, ids=page_id)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@ALL
def test_recipes_and_task_files_are_valid(page: Path) -> None:
    from openm6.train.recipe import check_recipe

    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if "instructions" in content:
            task_from_dict({"name": "shown", **content}, page.name)
        else:
            # A page may show a part of a recipe.
            whole = {"name": "shown", "output": "runs/shown", "model": {"preset": "demo"}, "train": {"steps": 1}}
            recipe = check_recipe({**whole, **content}, page.name)
            for section in recipe.data:
                if (task := getattr(section, "task", None)) and not task.endswith(".yaml"):
                    assert get_task(task)


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


def commands_in(block: str) -> Iterator[list[str]]:
    """The words of every line in a bash block, without comments and variables set before it."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z0-9_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def commands_on(page: Path) -> Iterator[list[str]]:
    """The words of every line in the bash blocks of a page."""
    for block in blocks(page, "bash"):
        yield from commands_in(block)


def openm6_words(words: list[str]) -> list[str] | None:
    """What follows `openm6` in a command, which torchrun or a path may stand before; None for other programs."""
    if words[0] in ("torchrun",):
        words = words[words.index("openm6") :]
    return words[1:] if Path(words[0]).name == "openm6" else None


def parse_words(words: list[str]) -> None:
    """Let the real program read a command, without running it. Raises what it says to a mistake."""
    command: Any = get_command(commands())
    context = None
    while True:
        context = command.make_context(command.name, list(words), parent=context)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not isinstance(command, TyperGroup) or not rest:
            break
        _, command, words = command.resolve_command(context, rest)
    if (command.context_settings or {}).get("ignore_unknown_options"):  # another command follows
        parse_words(rest)


@pytest.mark.slow
@ALL
def test_commands_can_be_read(page: Path, hooks: None) -> None:
    from openm6.edge.program import make_parser

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for words in commands_on(page):
        if (given := openm6_words(words)) is not None:
            parse_words(given)
        elif words[0] == "make":
            assert words[1] in targets
        elif words[-1].endswith("openm6-edge") or any(word.endswith("openm6-edge") for word in words[:2]):
            make_parser().parse_args(words[2:])
        elif words[0].endswith("pip") and (wanted := re.search(r"\[(.*)\]", words[-1])):
            assert set(wanted[1].split(",")) <= set(extras)
            assert words[-2] == "-e", "openm6 is in no index yet"
        else:
            assert Path(words[0]).name in ("cd", "curl", "export", "git", "pip", "python", "python3", "uv"), words


def test_the_reading_of_commands_finds_mistakes() -> None:
    for line in ("evl a", "eval a --task b --dat c", "eval a", "plan m6-10b --gpus many", "jobs submit train --wrong"):
        with pytest.raises(UsageError):
            parse_words(line.split())


@pytest.mark.slow
@ALL
def test_commands_named_in_sentences_exist(page: Path) -> None:
    for line in re.findall(r"`(?:\.venv/bin/)?openm6 ([^`]+)`", page.read_text("utf-8")):
        command: Any = get_command(commands())
        words = line.split()
        while isinstance(command, TyperGroup) and words and re.fullmatch(r"[a-z-]+", words[0]):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        if not (command.context_settings or {}).get("ignore_unknown_options"):
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, line


def inline_code(page: Path) -> list[str]:
    """The code in sentences and tables of a page."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S))


@cache
def known() -> tuple[set[str], set[str], set[str]]:
    """Identifiers of the sources, keys of recipes with their sections, options of both programs."""
    from openm6.edge.program import make_parser
    from openm6.model.config import ModelConfig

    files = [path for kind in ("py", "yaml", "html") for path in (ROOT / "openm6").rglob(f"*.{kind}")]
    files += [
        path for folder in ("benchmarks", "docs", "examples", "reproduce") for path in (ROOT / folder).rglob("*.py")
    ]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    texts = [path.stem + " " + path.read_text("utf-8") for path in files]
    words = {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}

    options: set[str] = set()
    waiting: list[Any] = [get_command(commands())]
    for command in waiting:
        options.update(option for parameter in command.params for option in parameter.opts + parameter.secondary_opts)
        waiting += getattr(command, "commands", {}).values()
    parsers: list[Any] = [make_parser()]
    for parser in parsers:
        options.update(option for action in parser._actions for option in action.option_strings)
        parsers += [inner for a in parser._actions if isinstance(a.choices, dict) for inner in a.choices.values()]

    from gen_recipe import recipe_tables

    keys = {field.name for field in fields(ModelConfig)}
    keys = {f"model.{name}" for name in keys} | {f"model.sizes.{name}" for name in keys}
    for title, table in re.findall(r"^### ([^\n]*)\n(.*?)(?=^###|\Z)", recipe_tables(), re.M | re.S):
        section = re.match(r"`([\w.]+)`", title)
        prefix = f"{section[1]}." if section else ""
        keys |= {prefix + name for name in re.findall(r"^\| `(\w+)` \|", table, re.M)}
    return words, keys, options


ELSEWHERE = {
    "get_total_norm", "clip_grads_with_norm_", "--from-file", "--index-url", "ASK_KEY", "apply_chat_template",
    "RENEW_DOCS", "label_predicted",
}  # fmt: skip
"""Names of other programs, and names that users or the tests give. coming-from.md has many more, and is not checked."""


@pytest.mark.parametrize("page", [page for page in EVERY_PAGE if page.stem != "coming-from"], ids=page_id)
def test_names_in_sentences_exist(page: Path, hooks: None) -> None:
    """Identifiers (also those in /metrics), modules, files of the repository, options that stand alone, recipe keys."""
    words, keys, options = known()
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for code in inline_code(page):
        for path in re.findall(r"(?<![\w./-])(?:openm6|tests|docs|examples|benchmarks)/[\w./-]*\w", code):
            assert (ROOT / path).exists() or "NAME" in path, (code, path)
        for path in re.findall(r"(?<![\w./-])[a-z]\w*/[\w/]+\.py\b", code):
            assert (ROOT / path).exists() or (ROOT / "openm6" / path).exists() or "NAME" in path, (code, path)
        for name in re.findall(r"(?<![\w/])openm6(?:\.\w+)+", code):
            assert name in ("openm6.json", "openm6.sources") or resolves(name), (code, name)
        code = re.sub(r"[\w./-]+/[\w./-]+", "", code)
        for name in re.findall(r"(?<![\w.])[A-Za-z_]\w*", code):
            if "_" in name.strip("_") or re.search("[a-z][A-Z]", name):
                base = name.removesuffix("_total") if name.startswith("openm6_") else name
                assert base in words | ELSEWHERE or name.startswith("unanswered_"), (code, name)
        if option := re.match(r"--[a-z][\w-]*", code):
            assert option[0] in options | ELSEWHERE, code
        for key in re.findall(r"(?<![\w./-])[a-z]+(?:\.[a-z][a-z_]*)+(?=[=:`,. )]|$)", code):
            if key.partition(".")[0] in sections and key.rpartition(".")[2] not in ("py", "json", "onnx", "yaml"):
                assert key in keys, (code, key)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of OpenM6, or an attribute of one."""
    module, *rest = name.split(".")
    found: Any = import_module(module)
    for part in rest:
        try:
            found = getattr(found, part) if hasattr(found, part) else import_module(f"{found.__name__}.{part}")
        except (ImportError, AttributeError):
            return False
    return True


@pytest.mark.parametrize(
    "code",
    [
        "openm6/model/rooter",
        "model/rooter.py",
        "openm6.model.rooter",
        "row_lenght",
        "--truncat",
        "train.stepss=5",
        "openm6_wait",
    ],
)
def test_the_check_of_names_finds_mistakes(code: str, hooks: None, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"Set `{code}`.", "utf-8")
    with pytest.raises(AssertionError):
        test_names_in_sentences_exist(tmp_path / "page.md", None)


def test_no_page_and_no_message_installs_from_an_index_that_has_no_openm6() -> None:
    for path in [*PAGES, *(ROOT / "openm6").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert not re.search(r"pip install [^-\n]*openm6", path.read_text("utf-8")), path


@pytest.fixture(scope="module")
def m6() -> Session:
    """What the pages' `m6` is: what `openm6.load` gives."""
    return drawing_session()


@ALL
def test_python_examples_name_what_there_is(page: Path, m6: Session) -> None:
    """Names that are imported from OpenM6 exist, and so do attributes of them and of `m6`."""
    for block in blocks(page, "python"):
        known: dict[str, Any] = {"m6": m6, "openm6": openm6}
        for node in ast.walk(ast.parse(block, page.name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openm6"):
                module = import_module(str(node.module))
                known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
                known.pop(target.id, None) if target.id != "m6" else None
        for node in ast.walk(ast.parse(block, page.name)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                assert hasattr(known[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.slow
def test_metrics_that_are_shown_measure(tmp_path: Path) -> None:
    from openm6.tasks.extend import load_extension
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


def test_every_command_is_listed(hooks: None) -> None:
    from gen_rooms import command_table

    program: Any = get_command(commands())
    rows = {row.split("`")[1]: row for row in command_table().splitlines()[2:]}
    assert rows.keys() == {f"openm6 {name}" for name in program.commands}
    for name, command in program.commands.items():
        for each in getattr(command, "commands", ()):
            assert f"`{each}`" in rows[f"openm6 {name}"]


def test_contributing_lists_the_packages(hooks: None) -> None:
    from gen_rooms import rooms

    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"<!-- ROOMS -->\n\n{rooms()}\n\n<!-- END OF ROOMS -->" in text, "python docs/gen_rooms.py writes it"


def test_every_key_of_a_recipe_is_listed(hooks: None) -> None:
    from gen_recipe import recipe_tables

    from openm6.train.recipe import Recipe, TrainSection

    keys = re.findall(r"^\| `(\w+)` \|", recipe_tables(), re.M)
    assert set(keys) >= {*Recipe.model_fields, *TrainSection.model_fields}


def test_every_command_and_option_is_in_the_reference(hooks: None) -> None:
    from gen_cli import cli_reference

    reference = cli_reference()
    sections = dict(re.findall(r"^##+ (openm6[^\n]*)\n(.*?)(?=^##|\Z)", reference, re.M | re.S))

    def walk(words: str, command: Any) -> None:
        for parameter in command.params:
            if parameter.name not in ("help", "install_completion", "show_completion"):
                for option in [o for o in parameter.opts if o.startswith("-")]:
                    assert option in sections[words], (words, option)
        for name, inner in getattr(command, "commands", {}).items():
            walk(f"{words} {name}", inner)

    walk("openm6", get_command(commands()))


def test_every_recipe_is_listed_whole(hooks: None) -> None:
    from gen_recipes import recipe_list

    from openm6.train.recipe import check_recipe

    text = recipe_list()
    shown = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    files = sorted((ROOT / "openm6" / "train" / "recipes").glob("*.yaml"))
    assert [yaml.safe_load(file.read_text("utf-8")) for file in files] == shown
    for file, recipe in zip(files, shown, strict=True):
        assert f"(#{file.stem})" in text and check_recipe(recipe, file.stem)


def test_every_page_is_in_one_of_the_six_groups() -> None:
    def pages(entry: Any) -> Iterator[str]:
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from [value] if isinstance(value, str) else pages(value)

    nav = re.search(r"^nav:.*", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M | re.S)
    assert nav
    first, *groups = yaml.safe_load(nav[0])["nav"]
    assert [name for group in groups for name in group] == [
        "Start", "Scenarios", "Guides", "Reference", "Operation", "Development",
    ]  # fmt: skip
    listed = [*pages(first), *(page for group in groups for page in pages(group))]
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert targets
    assert set(re.findall(r"`make ([\w-]+)`", text)) == set(targets[1].split())
    for path in re.findall(r"`((?:openm6|tests|docs|examples)/[\w/.-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for name, path in re.findall(r"`(\w+)` of `(openm6/[\w/.]+)`", text):
        assert re.search(rf"^(class )?{name}\b", (ROOT / path).read_text("utf-8"), re.M), (name, path)


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
