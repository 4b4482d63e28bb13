"""The package keeps its shape: layers, sizes, what may be imported, what may be opened."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "openm6").rglob("*.py"))

LONGEST_FILE = 400
"""Lines. A longer file holds two things."""

UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "cloudpickle.load",
    "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load", "torch.load", "torch.jit.load", "torch.hub.load",
    "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
}  # fmt: skip
"""Calls that can run code found in a file. A user's file is safetensors, JSON, or YAML by yaml.safe_load."""


def test_each_layer_imports_only_from_those_below() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for types included; imports inside of functions are left out."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES}
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in _outside_functions(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                places = {f"{node.module}.{one.name}" for one in node.names}
                found |= places & names.keys() or {str(node.module)}
            elif isinstance(node, ast.Import):
                found |= {one.name for one in node.names}
        imports[name] = (found & names.keys()) - {name}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from _outside_functions(node)


def test_what_makes_sequences_needs_no_pytorch() -> None:
    """So that a machine without it can ask a network in another form."""
    code = (
        "import sys; from openm6.tasks.library import get, names; from openm6.core.tokenizer import Tokenizer; "
        "[get(name) for name in names()]; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "tokenizers")
    code = f"import sys, openm6; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "numpy", "PIL", "pydantic", "tokenizers", "sqlite3", "asyncio")
    code = (
        "import sys; from openm6.cli import commands; commands(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_opens_a_file_that_can_run_code(path: Path) -> None:
    found = [f"{path}:{line}: {name}" for name, line in _calls(path) if name in UNSAFE or name.endswith(".read_pickle")]
    assert not found
    numpy_pickles = [
        f"{path}:{node.lineno}: allow_pickle"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.keyword)
        and node.arg == "allow_pickle"
        and getattr(node.value, "value", None) is not False
    ]
    assert not numpy_pickles


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch.load('a')", ["torch.load"]),
        ("import torch as t\nt.load('a')", ["torch.load"]),
        ("from torch import load as read\nread('a')", ["torch.load"]),
        ("import pickle\nwith open('a') as f:\n    pickle.load(f)", ["pickle.load"]),
        ("import json\njson.load('a')", ["json.load"]),
        ("session.load('a')", ["session.load"]),
    ],
)
def test_calls_are_known_by_their_full_names(tmp_path: Path, code: str, found: list[str]) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert [name for name, _ in _calls(path) if name != "open"] == found


def test_no_file_is_too_long_to_be_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


@pytest.mark.slow
def test_files_take_each_others_place_in_one_module() -> None:
    """There they are flushed before: a name whose content is not on the disk is an empty file after a power failure."""
    moves = {"os.replace", "os.rename", "shutil.move"}
    found = {
        path.name for path in SOURCES for name, _ in _calls(path) if name in moves or name.endswith("draft.replace")
    }
    assert found <= {"files.py"}


def test_torchvision_is_neither_installed_nor_imported() -> None:
    """With it beside a CPU torch, transformers' PreTrainedModel cannot be imported."""
    assert find_spec("torchvision") is None
    for path in SOURCES:
        assert "torchvision" not in {name.split(".")[0] for name in _imports(_tree(path)).values()}, path


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def _imports(tree: ast.Module) -> dict[str, str]:
    """Every imported name of a file, and what it stands for: `from torch import load as read` is read: torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _calls(path: Path) -> Iterator[tuple[str, int]]:
    """(full dotted name, line) of every call whose function is a name or an attribute of one."""
    tree = _tree(path)
    known = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts = []
            target = node.func
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            if isinstance(target, ast.Name):
                yield ".".join([known.get(target.id, target.id), *reversed(parts)]), node.lineno
