"""A bundle starts in an environment made from its own requirements; an old Python gets a message."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from openm6.edge.package import NEEDS, write_program
from tests.tasks.conftest import picture

ROOT = Path(__file__).parents[2]
UNUSED = {
    "cryptography": "for an edge device that encrypts what it keeps, which says so where it is missing",
    "safetensors": "for writing models",
    "sacrebleu": "for measuring",
    "transformers": "for its sandbox of chat templates; Jinja's own takes its place",
}  # fmt: skip
"""What the packed modules import inside of functions, and the program does without."""


@pytest.mark.slow
def test_what_the_program_imports_is_what_its_requirements_name(tmp_path: Path) -> None:
    write_program(tmp_path / "openm6-edge")
    with zipfile.ZipFile(tmp_path / "openm6-edge") as program:
        sources = {name: ast.parse(program.read(name)) for name in program.namelist() if name.endswith(".py")}
    at_start, later, missing = _imported(sources, "__main__.py")
    assert not missing, "modules of this package that the program imports and does not hold"
    known = packages_distributions()
    named = {_project(line) for line in NEEDS}
    assert {_project(known[name][0]) for name in at_start} <= named
    assert {_project(known[name][0]) for name in at_start | later - UNUSED.keys()} == named
    assert UNUSED.keys() <= later, "what nothing imports needs no reason"


def test_the_requirements_are_bounded_as_this_package_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["edge"]]
    bounds = {_project(line): line for line in lines}
    for line in NEEDS:
        assert bounds.get(_project(line), line) == line


def _imported(sources: dict[str, ast.Module], first: str) -> tuple[set[str], set[str], set[str]]:
    """Foreign packages that are imported at the start and inside of functions, by all modules that can be reached, and
    modules of openm6 that are not there."""
    at_start: set[str] = set()
    later: set[str] = set()
    missing: set[str] = set()
    waiting, seen = [first], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for module, names, inside in _imports(sources[name]):
            if not module.startswith("openm6"):
                if module.split(".")[0] not in sys.stdlib_module_names:
                    (later if inside else at_start).add(module.split(".")[0])
                continue
            places = [
                place for part in (module, *(f"{module}.{one}" for one in names)) if (place := _file(part, sources))
            ]
            waiting += places
            missing |= set() if _file(module, sources) else {module}
    return at_start, later, missing


def _file(module: str, sources: dict[str, ast.Module]) -> str | None:
    place = module.replace(".", "/")
    return next((name for name in (f"{place}.py", f"{place}/__init__.py") if name in sources), None)


def _imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, list[str], bool]]:
    """Module, names, and whether it is imported inside of a function; what only type checkers import is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], inside
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _project(line: str) -> str:
    return re.split(r"[<>=;\[ ]", line)[0].lower()


def _python(version: str) -> str:
    """A Python of this version; the test is skipped on a machine without one."""
    folders = (Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python")
    found = [str(file) for folder in folders for file in folder.glob(f"*{version}[.-]*/bin/python")]
    for place in (shutil.which(f"python{version}"), *found):
        if place and subprocess.run([place, "--version"], capture_output=True).returncode == 0:
            return place
    pytest.skip(f"There is no Python {version} here.")


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.10"])
def test_an_old_python_is_told_what_the_program_needs(version: str, tmp_path: Path) -> None:
    python = _python(version)
    write_program(tmp_path / "openm6-edge")
    told = subprocess.run([python, tmp_path / "openm6-edge", "tasks"], capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr == f"openm6-edge needs Python 3.11 or newer, and this is {version}.\n"


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    write_program(tmp_path / "openm6-edge")
    (tmp_path / "edge.json").write_text("{}")
    # -S: without the packages that are installed.
    told = subprocess.run(
        [sys.executable, "-I", "-S", tmp_path / "openm6-edge", "tasks"], capture_output=True, text=True
    )
    assert told.returncode == 1 and "pip install -r requirements.txt" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_package_starts_in_an_environment_of_its_own_requirements(
    version: str, package: Path, tmp_path: Path
) -> None:
    python = _python(version)
    inside = tmp_path / "environment/bin/python"
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True)
    # uv, with which `make` installs: pip takes ten times as long, and longer to install itself.
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", inside, "-r"]
    made = subprocess.run([*install, package / "requirements.txt"], capture_output=True, text=True)
    if "connect" in made.stderr.lower():
        pytest.skip("No package index can be reached from here.")
    assert made.returncode == 0, made.stderr
    (tmp_path / "a.jpg").write_bytes(picture(16, 16))
    asked = [inside, "-I", package / "openm6-edge", "run", "vqa", f"photo={tmp_path / 'a.jpg'}", "question=什么颜色?"]
    told = subprocess.run(asked, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    service = subprocess.run([inside, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import openm6.edge.service",
                              package / "openm6-edge"], capture_output=True, text=True)  # fmt: skip
    assert service.returncode == 0, service.stderr
