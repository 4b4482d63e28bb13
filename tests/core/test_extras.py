"""Optional libraries: a missing one is named with the command that installs it, and the base imports none of them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from openm6.core import extras
from openm6.core.errors import UsageError
from openm6.core.extras import install_command, is_installed, require

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ROOMS = {"console": "console", "serve": "serve", "edge/service.py": "edge"}
"""Folders and files that import the libraries of an extra at their top: they are imported by its commands alone."""


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def distributions(extra: str) -> set[str]:
    """All that an extra names, those of the extras in it too."""
    found: set[str] = set()
    for line in PROJECT["optional-dependencies"][extra]:
        if inner := re.fullmatch(r"openm6\[(.+)\]", line):
            found |= {name for part in inner[1].split(",") for name in distributions(part)}
        else:
            found.add(name_of(line))
    return found


BASE = {name_of(line) for line in PROJECT["dependencies"]}
BROUGHT = {"huggingface-hub": "transformers", "markupsafe": "torch", "starlette": "fastapi"}
"""Distributions that the package imports and does not name, and what brings them to every environment."""
OF_EXTRAS = {"pandas": "console", "sqlalchemy": "hub", "py-cpuinfo": "monitor"}
"""Likewise those that come with an extra's library."""


def test_a_missing_library_is_named_with_the_command() -> None:
    require("edge", "json", "numpy")
    with pytest.raises(UsageError, match=r"^not_there, nor_this\.one are not installed: .*install .*\[edge\]'?$"):
        require("edge", "json", "not_there", "nor_this.one")
    assert is_installed("numpy.linalg") and not is_installed("numpy.nothing")


def test_the_command_suits_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, clone = tmp_path / "bin", tmp_path / "a clone"
    for folder in (environment, clone):
        folder.mkdir()
    (clone / "pyproject.toml").touch()
    (environment / "pip").write_text("")
    (environment / "pip").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", str(environment))
    assert install_command("edge", tmp_path / "openm6") == "pip install 'openm6[edge]'"
    assert install_command("edge", clone / "openm6") == f"pip install -e '{clone}[edge]'"
    monkeypatch.chdir(clone)
    assert install_command("edge", clone / "openm6") == "pip install -e '.[edge]'"
    monkeypatch.setenv("PATH", "/nowhere")
    assert install_command("edge", clone / "openm6") == f"{environment}/python -m pip install -e '.[edge]'"
    monkeypatch.setattr(extras, "is_installed", lambda module: False)
    assert install_command("edge", tmp_path / "openm6") == (
        f"uv pip install --python {environment}/python 'openm6[edge]'"
    )


def required(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """The extra and the modules of every call of `require` with literals."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "require"]
    literal = [[a.value for a in call.args if isinstance(a, ast.Constant)] for call in calls]
    return [(str(words[0]), [str(word) for word in words[1:]]) for words in literal if words]


SOURCES = sorted((ROOT / "openm6").rglob("*.py"))


@pytest.mark.slow
def test_what_is_required_belongs_to_the_extra_that_is_named() -> None:
    known = packages_distributions()
    calls = [call for path in SOURCES for call in required(ast.parse(path.read_text("utf-8")))]
    assert len(calls) > 15
    for extra, modules in calls:
        for module in modules:
            roots = [name_of(name) for name in known.get(module.split(".")[0], [module])]
            assert set(roots) & distributions(extra), (extra, module)


def test_every_import_of_the_base_is_in_the_base_and_other_libraries_come_late() -> None:
    known = packages_distributions()
    for path in SOURCES:
        place = path.relative_to(ROOT / "openm6").as_posix()
        room = next((extra for prefix, extra in ROOMS.items() if place.startswith(prefix)), "")
        tree = ast.parse(path.read_text("utf-8"))
        late = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
        late |= {
            n for i in ast.walk(tree) if isinstance(i, ast.If) and getattr(i.test, "id", "") == "TYPE_CHECKING"
            for n in ast.walk(i)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            else:
                continue
            for root in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"openm6"}:
                names = {name_of(name) for name in known.get(root, [root])}
                names |= {BROUGHT[name] for name in names & BROUGHT.keys()}
                if node not in late and not names & BASE:
                    assert room and names & distributions(room), f"{place} imports {root} at its top"
                assert names & BASE or any(
                    names & (distributions(extra) | {n for n, e in OF_EXTRAS.items() if e == extra})
                    for extra in PROJECT["optional-dependencies"]
                    if extra not in ("dev", "docs", "all")
                ), f"{place} imports {root}, which no extra brings"


def test_all_is_every_extra_but_lowbit() -> None:
    others = PROJECT["optional-dependencies"].keys() - {"all", "dev", "docs", "lowbit"}
    assert distributions("all") == {name for extra in others for name in distributions(extra)}
