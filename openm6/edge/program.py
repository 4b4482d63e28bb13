"""The program of a package: `python openm6-edge run vqa photo=a.jpg question=...`"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openm6.errors import OpenM6Error, UsageError
from openm6.json_lines import dumps


def main(words: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(prog="openm6-edge", description="Ask a model without PyTorch.")
    here = Path(sys.argv[0]).resolve().parent
    parser.add_argument(
        "--package", type=Path, default=here, help="folder of the package; by default the program's own"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--json", action="store_true", help="value, confidence, milliseconds")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tasks", help="what it can be asked")
    commands.add_parser("about", help="sizes, and how long the start takes")
    asking = commands.add_parser("run", help="one answer: run TASK slot=value ...")
    asking.add_argument("task")
    asking.add_argument("slots", nargs="*", metavar="slot=value")
    given = parser.parse_args(words)
    try:
        print(_done(given, started))
    except (OpenM6Error, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, OpenM6Error) else 1)


def _done(given: argparse.Namespace, started: float) -> str:
    from openm6.edge.runner import EdgeModel

    model = EdgeModel(given.package, given.threads)
    if given.command == "tasks":
        lines = [f"{name}: {', '.join(task.inputs)} -> {', '.join(task.outputs)}" for name, task in model.tasks.items()]
        return "\n".join(lines)
    if given.command == "about":
        size = sum(file.stat().st_size for file in model.path.iterdir() if file.is_file())
        return dumps({**model.about, "bytes": size, "start_seconds": round(time.perf_counter() - started, 3)})
    record: dict[str, Any] = {}
    for word in given.slots:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f'"{word}" is no slot: write slot=value.')
        record[name] = value
    ready = time.perf_counter()
    answer = model.answer(given.task, record)
    if not given.json:
        return answer.value if isinstance(answer.value, str) else dumps(_plain(answer.value))
    return dumps({
        "value": _plain(answer.value), "confidence": round(answer.confidence, 4), "finished": answer.finished,
        "start_ms": round(1000 * (ready - started), 1), "answer_ms": round(1000 * (time.perf_counter() - ready), 1),
    })  # fmt: skip


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
