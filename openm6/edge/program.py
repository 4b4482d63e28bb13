"""The program of an ONNX bundle and of an edge device: `python openm6-edge run vqa photo=a.jpg question=...`

In the folder of an ONNX bundle its model answers, in that of an edge device the cascade.
"""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from openm6.core.errors import OpenM6Error, UsageError, set_once
from openm6.core.files import dumps, plain
from openm6.tasks.lengths import TRUNCATE

if TYPE_CHECKING:
    from openm6.edge.cascade import Cascade
    from openm6.edge.runner import EdgeModel


def main(words: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    given = make_parser().parse_args(words)
    try:
        if (output := _output(given, started)) is not None:
            print(output)
    except OpenM6Error as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except ImportError as error:
        print(f"{error}: `pip install -r requirements.txt` in the program's folder installs it.", file=sys.stderr)
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openm6-edge", description="Run a model without PyTorch.")
    here = Path(sys.argv[0]).resolve().parent
    folder = "folder of the ONNX bundle or edge device; by default the program's own"
    parser.add_argument("--package", type=Path, default=here, help=folder)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--json", action="store_true", help="value, confidence, milliseconds")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tasks", help="the tasks that it answers")
    commands.add_parser("about", help="sizes and start time")
    asking = commands.add_parser("run", help="one answer: run TASK slot=value ...")
    asking.add_argument("task")
    asking.add_argument("slots", nargs="*", metavar="slot=value")
    asking.add_argument("--truncate", choices=TRUNCATE, help="leave out the beginning of a text that is too long")
    about = {"serve": "serve an edge device over HTTP", "unit": "print the systemd unit of an edge device"}
    for name, text in about.items():
        serving = commands.add_parser(name, help=text)
        serving.add_argument("--host", default="127.0.0.1")
        serving.add_argument("--port", type=int, default=8100)
        serving.add_argument("--key-env", default="", help="environment variable with the key that clients need")
        anyone = "no key, although other machines can reach the address"
        serving.add_argument("--anyone", action="store_true", help=anyone)
    commands.add_parser("status", help="settings, stored answers and serving process of an edge device")
    commands.add_parser("check", help="check an edge device before it goes live: store, disk, key, cloud, model, clock")
    commands.add_parser("new-key", help="make a key for the encryption of the answer store")
    return parser


def _output(given: argparse.Namespace, started: float) -> str | None:
    """The output of a command; None where it has printed it."""
    from openm6.edge.device import FILE

    if given.command == "new-key":
        from openm6.edge.answer_store import new_key

        return new_key()
    if given.command == "check":
        from openm6.edge.status import check_device

        findings = []
        for finding in check_device(given.package):
            findings.append(finding)
            if not given.json:
                print(finding.line(), flush=True)
        if given.json:
            print(dumps([asdict(finding) for finding in findings]))
        sys.exit(any(finding.fails for finding in findings))
    if given.command == "status":
        from openm6.edge.status import status_of

        return dumps(status_of(given.package))
    if given.command == "unit":
        return unit_of(given.package, given.host, given.port, given.key_env, given.anyone)
    if given.command != "serve" and not (given.package / FILE).is_file():
        from openm6.edge.runner import EdgeModel

        model = EdgeModel(given.package, given.threads)
        return _use(given, started, model, model)
    from openm6.edge.cascade import Cascade

    if given.command == "serve":
        from openm6.edge.service import key_of, log, serve, start_log

        key = key_of(given.key_env)
        if (given.package / FILE).exists():
            start_log(given.package)
        try:
            serve(Cascade(given.package, given.threads), given.host, given.port, key, given.anyone)
        except OpenM6Error as error:
            log.info("not served: %s", error)
            raise
        return None
    with closing(Cascade(given.package, given.threads)) as cascade:
        return _use(given, started, cascade.model, cascade, version=cascade.device.version)


def _use(
    given: argparse.Namespace, started: float, model: EdgeModel, answering: EdgeModel | Cascade, **about: str
) -> str:
    """The output of `tasks`, `about` and `run`; `about`: further details of the model."""
    if given.command == "tasks":
        some = model.tasks.items()
        return "\n".join(f"{name}: {', '.join(task.inputs)} -> {', '.join(task.outputs)}" for name, task in some)
    if given.command == "about":
        size = sum(file.stat().st_size for file in model.path.iterdir() if file.is_file())
        seconds = round(time.perf_counter() - started, 3)
        return dumps({**model.about, **about, "bytes": size, "start_seconds": seconds})
    ready = time.perf_counter()
    answer = answering.answer(given.task, _record(given.slots), truncate=given.truncate)
    if not given.json:
        return answer.value if isinstance(answer.value, str) else dumps(answer.value, plain)
    found = {one.name: getattr(answer, one.name) for one in fields(answer) if one.name != "state"}
    for name in found.keys() & {"confidence", "probability"}:
        found[name] = found[name] if found[name] is None else round(found[name], 4)
    times = {"start_ms": ready - started, "answer_ms": time.perf_counter() - ready}
    return dumps({**found, **{name: round(1000 * seconds, 1) for name, seconds in times.items()}}, plain)


def _record(slots: Sequence[str]) -> dict[str, str]:
    record: dict[str, str] = {}
    for word in slots:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f'"{word}" is not of the form slot=value.')
        set_once(record, name, value)
    return record


def unit_of(path: Path, host: str, port: int, key_variable: str = "", anyone: bool = False) -> str:
    """The text of /etc/systemd/system/openm6-edge.service: the device is started with the machine, and again when it
    ends. Raises UsageError for a folder that is no edge device."""
    from openm6.edge.device import EdgeDevice

    device, place = EdgeDevice(path), path.resolve()
    words = [sys.executable, str(place / "openm6-edge"), "serve", "--host", host, "--port", str(port)]
    words += ["--key-env", key_variable] * bool(key_variable) + ["--anyone"] * anyone
    variables = [name for name in (device.settings.key, device.settings.encrypt, key_variable) if name]
    secrets = (
        f"# A file that only root reads (chmod 600), with a line NAME=VALUE for {', '.join(variables)}.\n"
        "EnvironmentFile=/etc/openm6-edge.env\n"
    )
    return f"""[Unit]
Description=OpenM6 edge device {_plain(device.settings.name)}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={" ".join(map(_quoted, words)).replace("$", "$$")}
{secrets if variables else ""}User={getpass.getuser()}
UMask=0077
Restart=always
RestartSec=5
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={_quoted(str(place))}

[Install]
WantedBy=multi-user.target"""


def _quoted(word: str) -> str:
    """A word of a unit: quoted, with the characters doubled that systemd would expand."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")
