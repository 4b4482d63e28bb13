"""openm6 bench."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli import app


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="train-step, decode, packing or attention.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON; the default is benchmarks/results.")] = None,
) -> None:
    """A benchmark against peers, both sides in one run: a table, and a JSON."""
    import openm6
    from openm6.errors import UsageError, suggest

    root = Path(openm6.__file__).resolve().parents[1]
    names = sorted(p.stem.replace("_", "-") for p in (root / "benchmarks").glob("[!_]*.py") if p.stem != "common")
    if not names:
        raise UsageError("Benchmarks come with the source checkout; this installation has none.")
    if name.replace("_", "-") not in names:
        raise UsageError(f"There is no benchmark {name}.{suggest(name, names)} There are: {', '.join(names)}.")
    where = ["--out", str(out.resolve())] if out else []
    done = subprocess.run([sys.executable, "-m", "benchmarks", name, *where], cwd=root, check=False)
    raise typer.Exit(done.returncode)
