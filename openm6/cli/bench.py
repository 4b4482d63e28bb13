"""openm6 bench, reproduce: benchmarks and reproductions of a source checkout."""

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
    name: Annotated[str, typer.Argument(help="Name of a file in benchmarks/: train-step, decode, experts, serve ...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON. Default: benchmarks/results.")] = None,
) -> None:
    """Run a benchmark against other libraries in one process; print a table and write JSON."""
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
    scale: Annotated[str, typer.Option(help="small: minutes on two cores; large: needs a GPU.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Folder for the page. Default: docs/reproduce.")] = None,
) -> None:
    """Reproduce a claim of the papers with several seeds; write a page with curves and the verdict."""
    root, names = _checkout("reproduce")
    _known("claim", claim, [name for name in names if name != "corpus"])
    if out:
        require_writable(out)
    where = ["--out", str(out.resolve())] if out else []
    done = subprocess.run([sys.executable, "-m", "reproduce", claim, "--scale", scale, *where], cwd=root, check=False)
    raise typer.Exit(done.returncode)


def _checkout(folder: str) -> tuple[Path, list[str]]:
    """The root of the source checkout and the names of the scripts in one of its folders."""
    import openm6

    root = Path(openm6.__file__).resolve().parents[1]
    return root, sorted(p.stem.replace("_", "-") for p in (root / folder).glob("[!_]*.py") if p.stem != "common")


def _known(kind: str, name: str, names: list[str]) -> None:
    from openm6.core.errors import UsageError, suggest

    if not names:
        raise UsageError(f"A {kind} comes with the source checkout; this installation has none.")
    if name.replace("_", "-") not in names:
        raise UsageError(f"There is no {kind} {name}.{suggest(name, names)} There are: {', '.join(names)}.")
