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
from openm6.serve.work import Request, Told
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


class Watched:
    """An engine, and all that it has told."""

    def __init__(self, session: Session, **settings: Any):
        self.told: list[Told] = []
        self.engine = Engine(session, self.told.append, Settings(**settings))

    def ask(self, identity: str, task: str, **more: Any) -> None:
        record = more.pop("record", None)
        fields = {key: more.pop(key) for key in list(more) if key in Request.__dataclass_fields__}
        self.engine.submit(Request(identity, task, record or more, **fields))

    def finish(self) -> dict[str, Told]:
        """Until nothing is open; the last that was told of each."""
        while self.engine._open or self.engine._inbox or self.engine._gone:
            self.engine._next()
        return {told.id: told for told in self.told if told.done}

    def texts(self) -> dict[str, str]:
        pieces: dict[str, str] = defaultdict(str)
        for told in self.told:
            pieces[told.id] += told.piece
        return pieces
