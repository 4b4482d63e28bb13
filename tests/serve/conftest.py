"""A small model that answers every kind of task, and an engine of it that is stepped by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch

from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.codec import Codec, CodecConfig
from openm6.serve.engine import Engine
from openm6.serve.settings import Settings
from openm6.serve.work import EngineRequest, RequestEvent
from openm6.tasks.library import get
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.conftest import tiny_config

WORDS = "图中的商品是什么？红色条纹连衣裙，蓝色圆点杯子。画一张图: 参考 风格 草图"


@pytest.fixture(scope="session")
def session() -> Session:
    torch.manual_seed(0)
    codec = Codec(CodecConfig(image_size=16, patch=2, widths=[8, 16], levels=[4, 4]))
    tokenizer = Tokenizer.train([WORDS], 600, 16)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_codes=16)
    tasks = [
        Task.from_instruction("[image:photo] 是什么? -> [label:kind|set=鞋,包,连衣裙]", name="kind"),
        Task.from_instruction("[text:text] -> [text:answer]", name="write"),
        *map(get, ("vqa", "text_to_image", "text_vector")),
    ]
    model = M6(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sure of what it says: rounding must not decide
            if parameter.ndim > 1:
                parameter.mul_(4)
        model.norm.weight.mul_(10)
    grid = ImageGrid(config.image_stride, config.image_max_patches)
    return Session(model, Processor(tokenizer, grid, 64, PictureCodec(codec)), tasks)


@pytest.fixture
def http(served: Any) -> Iterator[httpx2.Client]:
    """A client of the server that a module has as `served`."""
    with httpx2.Client(base_url=served.url, timeout=60) as one:
        yield one


FIELDS = {
    "decoding", "adapter", "candidates", "examples", "edit", "seconds", "pieces", "probabilities", "stop", "truncate",
}  # fmt: skip
"""Optional fields of a message to a worker."""


class Watched:
    """An engine that is stepped by hand, and all events that it has emitted."""

    def __init__(self, session: Session, **settings: Any):
        self.events: list[RequestEvent] = []
        self.engine = Engine(session, self.events.append, Settings(**settings))

    def ask(self, identity: str, task: str, **more: Any) -> EngineRequest:
        """Submit a request with the slots, or the `record`, and the fields in `more`."""
        fields = {name: more.pop(name) for name in FIELDS & more.keys()}
        request = EngineRequest.of({"id": identity, "task": task, "record": more.pop("record", more), **fields})
        self.engine.submit(request)
        return request

    def finish(self) -> dict[str, RequestEvent]:
        """Step until nothing is open; the last event of each request."""
        while not self.engine.is_idle:
            self.engine.step()
        return {event.id: event for event in self.events if event.done}

    def texts(self) -> dict[str, str]:
        """The pieces of each request, joined."""
        pieces: dict[str, str] = defaultdict(str)
        for event in self.events:
            pieces[event.id] += event.piece
        return pieces
