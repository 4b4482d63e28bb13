"""openm6 bench, openm6 reproduce: what comes with a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.core.files import require_writable


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="train-step, decode, packing, attention, experts ...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON; the default is benchmarks/results.")] = None,
) -> None:
    """A benchmark against peers, both sides in one run: a table, and a JSON."""
    root, names = _checkout("benchmarks")
    _known("benchmark", name, names)
    if out:
        require_writable(out)
    where = ["--out", str(out.resolve())] if out else []
    done = subprocess.run([sys.executable, "-m", "benchmarks", name, *where], cwd=root, check=False)
    raise typer.Exit(done.returncode)


@app.command()
def reproduce(
    claim: Annotated[
        str,
        typer.Argument(
            help="prototyping, auxiliary-loss, capacity, pseudo-to-real, sparse-vs-dense, progressive or five-percent."
        ),
    ],
    scale: Annotated[str, typer.Option(help="small: minutes on two cores; large: a GPU's work.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Folder for the page; the default is docs/reproduce.")] = None,
) -> None:
    """A claim of the papers at a small scale: several seeds, curves, and a page that says what holds."""
    root, names = _checkout("reproduce")
    _known("claim", claim, [name for name in names if name != "corpus"])
    if out:
        require_writable(out)
    where = ["--out", str(out.resolve())] if out else []
    done = subprocess.run([sys.executable, "-m", "reproduce", claim, "--scale", scale, *where], cwd=root, check=False)
    raise typer.Exit(done.returncode)


def _checkout(folder: str) -> tuple[Path, list[str]]:
    """The root of the source checkout, and the names in one of its folders."""
    import openm6

    root = Path(openm6.__file__).resolve().parents[1]
    return root, sorted(p.stem.replace("_", "-") for p in (root / folder).glob("[!_]*.py") if p.stem != "common")


def _known(kind: str, name: str, names: list[str]) -> None:
    from openm6.core.errors import UsageError, suggest

    if not names:
        raise UsageError(f"A {kind} comes with the source checkout; this installation has none.")
    if name.replace("_", "-") not in names:
        raise UsageError(f"There is no {kind} {name}.{suggest(name, names)} There are: {', '.join(names)}.")
