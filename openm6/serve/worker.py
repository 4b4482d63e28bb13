"""The process in which a model is: `python -m openm6.serve.worker FD`, started by the server (fleet.py).

Over the socket FD it is told the model and its settings, then requests; it says `ready`, then what becomes of each. Its
end of the socket closes when it dies, which is how the server knows.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from openm6.model.count import count_parameters
from openm6.serve.wire import error_of, kind_of, packed, read, told_of

if TYPE_CHECKING:
    from openm6.inference.session import Session
    from openm6.serve.engine import Engine

POWER_EVERY = 5.0
"""Seconds between two readings of the energy."""
READERS = 2
"""Threads that hear what is asked and read its pictures and texts, while the engine works."""
NICE = 5
"""Below the server's process: whoever comes is heard, and refused if need be, while others are computed for."""


def main(descriptor: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole session: when to end, the server says
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    os.nice(NICE)
    stream = connection.makefile("rb")
    start = read(stream)
    if start is None:
        return 1
    outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    writer = Thread(target=_write, args=(connection, outbox), daemon=True)
    writer.start()
    try:
        engine = _opened(start, outbox)
    except Exception as error:
        traceback.print_exc()
        outbox.put({"fatal": told_of(error)})
        outbox.put(None)
        writer.join()
        return 1
    outbox.put({"ready": described(engine.session)})
    gc.collect()
    gc.freeze()  # model and modules stay: no pauses to look through them
    power = _Power()
    turn = Lock()
    for _ in range(READERS):
        Thread(target=_listen, args=(stream, turn, engine, power, outbox), daemon=True).start()
    engine.run()
    outbox.put({"state": _state(engine, power)})
    outbox.put(None)
    writer.join()
    return 0


def _opened(start: dict[str, Any], outbox: Any) -> Engine:
    from openm6.inference.session import Session
    from openm6.serve.engine import Engine
    from openm6.serve.settings import Settings
    from openm6.serve.threads import fit_threads
    from openm6.serve.work import Told
    from openm6.tasks.extend import load_named_extensions

    load_named_extensions()

    def tell(told: Told) -> None:
        message: dict[str, Any] = {"id": told.id, "tokens": told.tokens, "prompt_tokens": told.prompt_tokens}
        if told.piece:
            message["piece"] = told.piece
        if told.error is not None:
            if kind_of(told.error) == "internal":
                traceback.print_exception(told.error)
            message |= error_of(told.error)
        elif told.done:
            message |= {"value": told.value, "finished": told.finished, "truncated": told.truncated}
        outbox.put(message)

    session = Session.load(start["model"], adapters=start.get("adapters") or {})
    if "OMP_NUM_THREADS" not in os.environ:
        with session.precision():
            fit_threads(session.model)
    return Engine(session, tell, Settings(**start.get("settings") or {}))


def described(session: Session) -> dict[str, Any]:
    """What the server tells of a model: its tasks (those that it was trained on, then the library's), what they take
    and give, its adapters, its size, and whether a seed gives the same answer whatever is answered beside it."""
    import torch

    from openm6.core.bases import base_of
    from openm6.model.files import eyes_of
    from openm6.serve.reproducible import is_reproducible
    from openm6.tasks.library import get, names

    library = {name: get(name) for name in names()}
    adapters = {name: session.adapter(name) for name in session.adapters}
    every = {**library, **{name: task for view in adapters.values() for name, task in view.tasks.items()}}
    every |= session.tasks
    draws = session.processor.codec is not None
    with session.precision():
        reproducible = is_reproducible(session.model)
    return {
        "tasks": {
            name: {
                "description": task.description, "instructions": [one.text for one in task.instructions],
                "slots": {slot: task.slots[slot].type for slot in task.slots}, "inputs": list(task.inputs),
                "outputs": list(task.outputs), "schema": task.schema(), "decode": dict(task.decode),
                "kind": "picture" if task.draws else "vector" if task.embeds else "value" if task.head else "text",
                "sketch": task.sketch, "trained": session.is_trained_on(task), "example": dict(task.example),
                "trained_adapters": [name for name, view in adapters.items() if view.is_trained_on(task)],
            }
            for name, task in every.items()
            if (draws or not task.draws) and (not task.head or task.head in session.model.heads)
        },
        "adapters": session.adapters, "parameters": sum(count_parameters(session.model.config).values()),
        "positions": session.processor.max_length, "vector": session.model.config.hidden_size,
        "codes": session.codec.side**2 if draws else 0, "picture": session.codec.size if draws else None,
        "eyes": eyes_of(base_of(session.path) or session.path) if session.path else "",
        "path": str(session.path), "threads": torch.get_num_threads(), "reproducible": reproducible,
    }  # fmt: skip


def _write(connection: socket.socket, outbox: Any) -> None:
    """A piece of text for each of many requests comes with every step: what there is goes together."""
    messages: list[dict[str, Any] | None] = []
    while None not in messages:
        messages = [outbox.get()]
        while not outbox.empty():
            messages.append(outbox.get())
        try:
            connection.sendall(b"".join(_sendable(message) for message in messages if message is not None))
        except OSError:
            os._exit(1)  # nobody listens any more


def _sendable(message: dict[str, Any]) -> bytes:
    try:
        return packed(message)
    except Exception as error:
        cost = {name: message.get(name, 0) for name in ("tokens", "prompt_tokens")}
        return packed({"id": message.get("id"), **cost, **error_of(error)})


def _listen(stream: Any, turn: Lock, engine: Engine, power: _Power, outbox: Any) -> None:
    """Until the server closes its end: then what is open is of no use to anybody. One listens while others read what
    came: handing it over would take as long as many a reading."""
    from openm6.serve.work import Request

    def submit(message: dict[str, Any]) -> None:
        seconds = message.pop("seconds", None)
        request = Request(**message, deadline=None if seconds is None else time.monotonic() + seconds)
        try:
            engine.submit(request)
        except Exception as error:
            if kind_of(error) == "internal":
                traceback.print_exc()
            outbox.put({"id": request.id, "tokens": 0, "prompt_tokens": 0, **error_of(error)})

    while True:
        with turn:
            message = read(stream)
        if message is None:
            os._exit(0)
        what = message.pop("do")
        if what == "ask":
            submit(message)
        elif what == "cancel":
            engine.cancel(message["id"])
        elif what == "state":
            outbox.put({"state": _state(engine, power)})
        elif what == "stop":
            engine.stop()


class _Power:
    """Energy of this process (core/energy.py), in a thread of its own: the meter takes seconds to look at the machine,
    and no request waits for that."""

    def __init__(self) -> None:
        self.told = {"energy_kwh": 0.0, "watts": 0.0}
        Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        from openm6.core.energy import EnergyMeter

        meter, before, kwh = EnergyMeter(), time.monotonic(), 0.0
        while True:
            time.sleep(POWER_EVERY)
            use, now = meter.read(), time.monotonic()
            if use is None:
                return
            self.told = {"energy_kwh": use.kwh, "watts": (use.kwh - kwh) * 3.6e6 / (now - before)}
            before, kwh = now, use.kwh


def _state(engine: Engine, power: _Power) -> dict[str, Any]:
    return {**asdict(engine.counts), "waiting": engine.waiting, "running": engine.running, **power.told}


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
