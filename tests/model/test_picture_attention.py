"""A network with block-sparse pictures against the same weights under an explicit mask: training and drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.core.batch import Batch, allowed, count_pairs, pad, pad_drawn
from openm6.core.errors import OpenM6Error
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, SOURCE_BLOCKS, ImageTarget, Sequence
from openm6.inference.draw import Codes, Drawing, draw, estimate
from openm6.model import M6
from openm6.model.count import attention_pairs
from openm6.model.cpu.attention import additive
from openm6.model.rotary import rotary_angles
from openm6.model.sparse import SparsePattern
from tests.conftest import VOCABULARY, tiny_config

SIDE, COUNT = 8, 64
PATTERN = SparsePattern(SIDE, (2, 2))
CODES = Codes(VOCABULARY - 20, 20, COUNT, 3, (11, 12, 13), 14, 15)


def sparse_model(**sizes: object) -> M6:
    torch.manual_seed(0)
    return M6(tiny_config(initializer_range=0.2, picture_side=SIDE, picture_tile=[2, 2], **sizes)).eval()


def drawn(text: int, block: int, tail: int, seed: int, read: str = "bidirectional") -> Sequence:
    rng, total = np.random.default_rng(seed), text + COUNT + tail
    blocks = np.full(total, SOURCE_BLOCKS[read], np.int32)
    blocks[text - 2 : text] = CAUSAL
    blocks[text:] = block
    labels = rng.integers(4, VOCABULARY, total).astype(np.int32)
    labels[:text] = IGNORE
    ids = rng.integers(4, VOCABULARY, total).astype(np.int32)
    return Sequence(ids, blocks, labels, target=ImageTarget(range(text, text + COUNT)))


def by_explicit_mask(network: M6, batch: Batch) -> torch.Tensor:
    """Hidden states under the mask rule, from which pairs of codes that the pattern does not keep are taken."""
    assert batch.codes is not None
    seen = allowed(batch.segments, batch.blocks)
    numbers = torch.arange(COUNT)
    inside = slice(batch.codes.start, batch.codes.stop)
    seen[:, inside, inside] &= PATTERN.allowed(numbers[:, None], numbers)
    seen |= torch.eye(seen.shape[1], dtype=torch.bool)  # padding sees itself: no row without any key
    rope = rotary_angles(network.config, batch.positions, torch.float32)
    hidden, _ = network.backbone(network.embed_batch(batch), rope, additive(seen[:, None], torch.float32))
    return hidden


@pytest.mark.parametrize("kind", ["both ways", "judged", "one by one"])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_key_value_heads": 2}, {"positions": "learned", "norm": "layer"}, {"source": "causal"}],
)
def test_training_is_that_of_the_explicit_mask(kind: str, sizes: dict[str, object]) -> None:
    network = sparse_model(**sizes)
    block, tail = (CAUSAL, 0) if kind == "one by one" else (1, 3 if kind == "judged" else 0)
    some = [drawn(text, block, tail, seed, network.config.source) for seed, text in enumerate((7, 4, 12))]
    batch = pad_drawn(some, 0)
    real = batch.segments > 0
    output = network(batch)
    wanted = by_explicit_mask(network, batch)
    torch.testing.assert_close(output.hidden[real], wanted[real], atol=1e-4, rtol=1e-3)
    output.loss.backward()
    own = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    labels = batch.labels[real]
    logits = network.logits(by_explicit_mask(network, batch)[real])
    torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").backward()
    for name, gradient in own.items():
        wanted_gradient = dict(network.named_parameters())[name].grad
        scale = float(wanted_gradient.abs().max())
        torch.testing.assert_close(gradient / scale, wanted_gradient / scale, atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("block", [1, CAUSAL])
def test_pairs_are_those_of_the_mask_and_of_the_tiles(block: int) -> None:
    config, some = sparse_model().config, [drawn(text, block, 0, text) for text in (7, 4)]
    batch, pattern = pad_drawn(some, 0), SparsePattern(SIDE, (2, 2), block == CAUSAL)
    tiles = pattern.neighbours()[1].sum() * pattern.area**2
    texts = sum(length * (length + 1) // 2 + (length - 2) * (length - 3) // 2 + length * COUNT for length in (7, 4))
    assert attention_pairs(config, batch) == texts + 2 * tiles
    assert attention_pairs(tiny_config(), batch) == count_pairs(batch.segments, batch.blocks)


def prompts() -> list[Sequence]:
    rng = np.random.default_rng(5)
    made = []
    for length in (6, 9, 4):
        blocks = np.full(length, SOURCE, np.int32)
        blocks[-2:] = CAUSAL
        ids = rng.integers(4, VOCABULARY - 20, length).astype(np.int32)
        made.append(Sequence(ids, blocks, np.full(length, IGNORE, np.int32)))
    return made


def with_codes(prompt: Sequence, ids: list[int], block: int) -> Sequence:
    count = len(ids)
    return Sequence(
        np.append(prompt.ids, ids).astype(np.int32),
        np.append(prompt.blocks, [block] * count).astype(np.int32),
        np.append(prompt.labels, [IGNORE] * count).astype(np.int32),
        target=ImageTarget(range(len(prompt), len(prompt) + COUNT)),
    )


@pytest.mark.parametrize("equal", [True, False])
@torch.inference_mode()
def test_drawing_in_passes_and_estimates_use_the_pattern(equal: bool) -> None:
    network = sparse_model()
    some = [prompts()[0]] * 3 if equal else prompts()
    found = draw(network, some, [], CODES, Drawing(passes=1, temperature=0))
    asked = pad_drawn([with_codes(p, [CODES.mask_id] * COUNT, 1) for p in some], 0)
    assert asked.codes is not None
    hidden = by_explicit_mask(network, asked)[:, asked.codes.start : asked.codes.stop]
    logits = network.logits(hidden)[..., CODES.start : CODES.start + CODES.number]
    assert torch.equal(found.codes, logits.argmax(-1))
    whole = pad_drawn(
        [
            with_codes(p, [*(CODES.start + c).tolist(), *CODES.estimates], 1)
            for p, c in zip(some, found.codes, strict=True)
        ],
        0,
    )
    logits = network.logits(by_explicit_mask(network, whole)[:, -3:])
    wanted = logits[..., CODES.yes_id] - logits[..., CODES.no_id]
    torch.testing.assert_close(found.estimates, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(estimate(network, some, found.codes, CODES).estimates, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("equal", [True, False])
@torch.inference_mode()
def test_drawing_one_by_one_uses_the_pattern(equal: bool) -> None:
    network = sparse_model()
    some = [prompts()[0]] * 2 if equal else prompts()[:2]
    found = draw(network, some, [], CODES, Drawing(passes=0, temperature=0)).codes
    for prompt, codes in zip(some, found, strict=True):
        whole = pad_drawn([with_codes(prompt, (CODES.start + codes).tolist(), CAUSAL)], 0)
        hidden = by_explicit_mask(network, whole)[0, len(prompt) - 1 : -1]
        logits = network.logits(hidden)[:, CODES.start : CODES.start + CODES.number]
        assert torch.equal(codes, logits.argmax(-1))


def test_another_number_of_codes_is_refused() -> None:
    network = sparse_model()
    with pytest.raises(OpenM6Error, match="64 codes|60 codes"):
        draw(network, prompts(), [], Codes(VOCABULARY - 20, 20, 60, 3, (11, 12, 13), 14, 15))


def test_texts_of_such_a_network_are_read_as_ever() -> None:
    network = sparse_model()
    plain = M6(tiny_config(initializer_range=0.2)).eval()
    plain.load_state_dict(network.state_dict())
    batch = pad(prompts(), 0)
    assert torch.equal(network(batch).hidden, plain(batch).hidden)
