"""A seed has the same answer whatever is answered beside it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from openm6.core.images import ImageGrid
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.cpu.pack import pack_for_cpu
from openm6.model.lowbit import INT8
from openm6.serve.calibrate import is_reproducible
from openm6.tasks.processor import Processor
from tests.conftest import tiny_config
from tests.serve.conftest import WORDS, Watched
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def model(session: Session, request: pytest.FixtureRequest) -> Session:
    """A model as it is served on a CPU, its pictures read by convolutions. Its probabilities are flat, so that a last
    bit changes many an answer."""
    torch.manual_seed(0)
    processor = session.processor
    config = tiny_config(
        vocab_size=processor.tokenizer.vocab_size, num_codes=16, hidden_size=64, head_dim=16, intermediate_size=1536,
        image_embedder="stem", stem_widths=[16, 32, 64], image_patch=8,
    )  # fmt: skip
    grid = ImageGrid(config.image_stride, config.image_max_patches)
    network = pack_for_cpu(M6(config).eval(), request.param)
    return Session(network, Processor(processor.tokenizer, grid, 256, processor.codec))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def served(model: Session, request: pytest.FixtureRequest) -> Iterator[Session]:
    torch.set_num_threads(request.param)
    yield model
    torch.set_num_threads(1)


def wishes(count: int, rng: random.Random) -> list[tuple[str, dict, dict]]:
    """Texts of all lengths and pictures of three sizes, sampled by seeds of their own."""
    found: list[tuple[str, dict, dict]] = []
    for number in range(count):
        decoding: dict[str, Any] = {"max_new_tokens": rng.randint(1, 24), "temperature": 1.0, "seed": number}
        decoding |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.9}])
        if number % 2:
            side = rng.choice([16, 24, 32])
            found.append(("image_captioning", decoding, {"photo": picture(side, side, seed=number)}))
        else:
            text = (WORDS * 6)[: rng.randint(1, 180)]
            found.append(("summary", decoding, {"passage": text}))
    return found


def test_a_sampled_answer_is_the_one_that_it_is_alone(served: Session) -> None:
    """Beside 1 to 16 others, which join and leave at any time."""
    rng = random.Random(0)
    asked = wishes(80, rng)
    alone = [served.run(task, decoding=decoding, **record) for task, decoding, record in asked]
    assert len(set(alone)) > 60
    watched = Watched(served)
    for number, (task, decoding, record) in enumerate(asked):
        watched.ask(str(number), task, record=record, decoding=decoding)
        for _ in range(rng.choice([0, 0, 0, 1, 5])):
            watched.engine.step()
        while (state := watched.engine.state()).waiting + state.running > 16:
            watched.engine.step()
    found = watched.finish()
    assert [number for number, value in enumerate(alone) if found[str(number)].value != value] == []


def test_sampled_answers_to_many_records_do_not_depend_on_the_batch_size(served: Session) -> None:
    records = [{"photo": picture(16 + 8 * (n % 3), 16, seed=n)} for n in range(20)]
    decoding = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    every = [
        list(served.run_many("image_captioning", records, batch_size=size, decoding=decoding)) for size in (1, 3, 20)
    ]
    assert every[0] == every[1] == every[2]


@pytest.mark.parametrize("decoding", [{"passes": 4}, {"passes": 4, "guidance": 1.0}, {"passes": 0}])
def test_a_picture_that_is_drawn_is_the_one_that_it_is_alone(served: Session, decoding: dict) -> None:
    decoding = {"guidance": 0.0, "temperature": 1.0, "seed": 3, **decoding}
    captions = [(WORDS * 2)[:length] for length in (1, 2, 5, 9, 17, 30, 44)]
    watched = Watched(served)
    for number, caption in enumerate(captions):
        watched.ask(str(number), "text_to_image", caption=caption, decoding={**decoding})
    found = watched.finish()
    for number, caption in enumerate(captions):
        alone = served.draw("text_to_image", decoding=decoding, caption=caption)[0]
        assert np.array_equal(found[str(number)].value[0].codes, alone.codes), caption


def test_labels_with_probabilities_are_drawn_as_if_each_were_alone(session: Session) -> None:
    decoding = {"temperature": 5.0, "seed": 1}
    watched = Watched(session)
    for number in range(12):
        watched.ask(str(number), "kind", photo=picture(seed=3), probabilities=True, decoding=decoding)
    assert len({told.value["value"] for told in watched.finish().values()}) == 1


def test_a_picture_has_the_same_features_beside_others(served: Session) -> None:
    assert served.model.image is not None
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    with torch.inference_mode():
        together = served.model.image(pixels)
        assert torch.equal(together, torch.cat([served.model.image(one[None]) for one in pixels]))


def test_whether_a_model_is_reproducible_is_measured(model: Session) -> None:
    """Weights in 8 bits round a row of inputs by the rows beside it."""
    assert is_reproducible(model.model)
    config = copy.deepcopy(model.model.config)
    assert not is_reproducible(pack_for_cpu(M6(config).eval(), INT8))
