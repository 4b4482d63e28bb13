"""The process of a model: `python -m openm6.serve.worker FD`, started by the server (fleet.py).

Over the socket FD it receives the model and its settings, then requests; it sends `ready`, then the events of each
request. Its end of the socket closes when it dies, which tells the server.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import time
from dataclasses import asdict
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from openm6.model.count import count_parameters
from openm6.serve.wire import Settings, error_of, packed, received, reported

if TYPE_CHECKING:
    from openm6.inference.session import Session
    from openm6.serve.engine import Engine

POWER_EVERY = 5.0
"""Seconds between two readings of the energy meter."""
READERS = 2
"""Number of threads that receive requests and prepare their pictures and texts while the engine works."""
NICE = 5
"""Niceness relative to the server's process, which accepts or refuses requests while others are computed."""


def main(descriptor: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server decides when a worker ends
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    os.nice(NICE)
    incoming = received(connection)
    if (start := next(incoming, None)) is None:
        return 1
    outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    writer = Thread(target=_write, args=(connection, outbox), daemon=True)
    writer.start()
    try:
        engine = _opened(start, outbox)
    except Exception as error:
        outbox.put({"fatal": str(reported(error))})
        outbox.put(None)
        writer.join()
        return 1
    outbox.put({"ready": described(engine.session)})
    gc.collect()
    gc.freeze()  # model and modules stay: the collector need not pause to traverse them
    power: dict[str, float] = {}
    Thread(target=_measure, args=(power,), daemon=True).start()
    turn = Lock()
    for _ in range(READERS):
        Thread(target=_listen, args=(incoming, turn, engine, power, outbox), daemon=True).start()
    engine.run()
    outbox.put({"state": asdict(engine.state()) | power})
    outbox.put(None)
    writer.join()
    return 0


def _opened(start: dict[str, Any], outbox: Any) -> Engine:
    from openm6.inference.session import Session
    from openm6.serve.calibrate import fit_threads
    from openm6.serve.engine import Engine
    from openm6.serve.work import RequestEvent
    from openm6.tasks.extend import load_named_extensions

    load_named_extensions()

    def emit(event: RequestEvent) -> None:
        message: dict[str, Any] = {"id": event.id, "tokens": event.tokens, "prompt_tokens": event.prompt_tokens}
        if event.piece:
            message["piece"] = event.piece
        if event.reasoning:
            message["reasoning"] = event.reasoning
        if event.error is not None:
            message |= error_of(event.error)
        elif event.done:
            message |= {"value": event.value, "finished": event.finished, "truncated": event.truncated}
        outbox.put(message)

    session = Session.load(start["model"], adapters=start.get("adapters") or {})
    if "OMP_NUM_THREADS" not in os.environ:
        with session.precision():
            fit_threads(session.model)
    return Engine(session, emit, Settings(**start.get("settings") or {}))


def described(session: Session) -> dict[str, Any]:
    """The description of a model for the server: its own tasks and the library's with their inputs and outputs, its
    adapters, its size, whether it can reason before it answers, and whether a seed gives the same answer whatever else
    is in the batch."""
    import torch

    from openm6.core.bases import base_of
    from openm6.inference.modes import mode_of
    from openm6.inference.request import usual_decoding
    from openm6.model.files import image_encoder_id
    from openm6.serve.calibrate import is_reproducible
    from openm6.tasks.library import get, names

    library = {name: get(name) for name in names()}
    adapters = {name: session.adapter(name) for name in session.adapters}
    every = {**library, **{name: task for view in adapters.values() for name, task in view.tasks.items()}}
    every |= session.tasks
    draws, chat = session.processor.codec is not None, session.processor.chat
    with session.precision():
        reproducible = is_reproducible(session.model)
    return {
        "tasks": {
            name: {
                "description": task.description, "instructions": [one.text for one in task.instructions],
                "slots": {slot: task.slots[slot].type for slot in task.slots}, "inputs": list(task.inputs),
                "outputs": list(task.outputs), "schema": task.schema(), "decode": usual_decoding(session, task),
                "kind": mode_of(task).result,
                "sketch": task.sketch, "trained": session.is_trained_on(task), "example": dict(task.example),
                "trained_adapters": [name for name, view in adapters.items() if view.is_trained_on(task)],
            }
            for name, task in every.items()
            if mode_of(task).available(session, task)
        },
        "adapters": session.adapters, "parameters": sum(count_parameters(session.model.config).values()),
        "positions": session.processor.max_length, "vector": session.model.config.hidden_size,
        "codes": session.codec.side**2 if draws else 0, "picture": session.codec.size if draws else None,
        "image_encoder": image_encoder_id(base_of(session.path) or session.path) if session.path else "",
        "path": str(session.path), "threads": torch.get_num_threads(), "reproducible": reproducible,
        "reasons": chat is not None and chat.reasons,
    }  # fmt: skip


def _write(connection: socket.socket, outbox: Any) -> None:
    """Send messages until None comes. Every step brings a piece of text for many requests: they are sent together."""
    waiting: list[dict[str, Any] | None] = []
    while None not in waiting:
        waiting = [outbox.get()]
        while not outbox.empty():
            waiting.append(outbox.get())
        try:
            connection.sendall(b"".join(_sendable(message) for message in waiting if message is not None))
        except OSError:
            os._exit(1)  # the server is gone


def _sendable(message: dict[str, Any]) -> bytes:
    try:
        return packed(message)
    except Exception as error:
        cost = {name: message.get(name, 0) for name in ("tokens", "prompt_tokens")}
        return packed({"id": message.get("id"), **cost, **error_of(error)})


def _listen(incoming: Any, turn: Lock, engine: Engine, power: dict[str, float], outbox: Any) -> None:
    """Receive messages until the server closes its end, which ends the process. One thread waits for a message while
    the others prepare requests: handing one over would take as long as many preparations."""
    from openm6.serve.work import EngineRequest

    while True:
        with turn:
            message = next(incoming, None)
        if message is None:
            os._exit(0)
        what = message.pop("do")
        if what == "ask":
            try:
                engine.submit(EngineRequest.of(message))
            except Exception as error:
                outbox.put({"id": message["id"], "tokens": 0, "prompt_tokens": 0, **error_of(error)})
        elif what == "cancel":
            engine.cancel(message["id"])
        elif what == "state":
            outbox.put({"state": asdict(engine.state()) | power})
        elif what == "stop":
            engine.stop()


def _measure(power: dict[str, float]) -> None:
    """Keep the energy of this process ("energy_kwh", "watts") in `power`, which stays empty without codecarbon. Runs in
    a thread of its own, because the meter (core/energy.py) takes seconds to inspect the machine, and not before the
    first requests, with which it would compete."""
    time.sleep(POWER_EVERY)
    from openm6.core.energy import EnergyMeter

    meter, before, kwh = EnergyMeter(), time.monotonic(), 0.0
    while True:
        time.sleep(POWER_EVERY)
        use, now = meter.read(), time.monotonic()
        if use is None:
            return
        power |= {"energy_kwh": use.kwh, "watts": (use.kwh - kwh) * 3.6e6 / (now - before)}
        before, kwh = now, use.kwh


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
