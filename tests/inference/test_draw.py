"""Drawing: filling in against a whole forward pass, one after the other against the definition, kept codes, seeds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from openm6.core.batch import pad
from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE_BLOCKS, ImageTarget, Sequence
from openm6.inference.draw import OPEN, Codes, Drawing, draw, estimate
from openm6.inference.generate import sample
from openm6.model import M6
from openm6.model.cache import fill, prefill, step
from tests.conftest import VOCABULARY, tiny_config

CODES = Codes(VOCABULARY - 20, number=20, count=9, mask_id=3, estimates=(11, 12, 13), yes_id=14, no_id=15)


def model(**sizes: Any) -> M6:
    torch.manual_seed(0)
    return M6(tiny_config(initializer_range=0.2, **sizes)).eval()


def prompt(length: int, seed: int = 0, read: str = "bidirectional") -> Sequence:
    ids = np.random.default_rng(seed).integers(4, VOCABULARY - 20, length).astype(np.int32)
    blocks = np.full(length, SOURCE_BLOCKS[read], np.int32)
    blocks[-2:] = CAUSAL
    return Sequence(ids, blocks, np.full(length, IGNORE, np.int32))


def extended(start: Sequence, ids: list[int], block: int) -> Sequence:
    """With the codes of a picture, and what follows them."""
    count = len(ids)
    return Sequence(
        np.append(start.ids, ids).astype(np.int32),
        np.append(start.blocks, [block] * count).astype(np.int32),
        np.append(start.labels, [IGNORE] * count).astype(np.int32),
        target=ImageTarget(range(len(start), len(start) + CODES.count)),
    )


@pytest.mark.parametrize("sizes", [{}, {"norm": "layer", "activation": "gelu", "positions": "learned"}])
@pytest.mark.parametrize("lengths", [(5, 5), (7, 4)])
@pytest.mark.parametrize("read", SOURCE_BLOCKS)
def test_filling_in_is_a_whole_forward_pass(sizes: dict[str, Any], lengths: tuple[int, int], read: str) -> None:
    network = model(**sizes)
    prompts = [prompt(length, seed, read) for seed, length in enumerate(lengths)]
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        _, cache = prefill(network, pad(prompts, 0), 20)
        for _ in range(2):  # the cache stays as it is
            filled = fill(network, ids, cache, 9)
        for row, start in enumerate(prompts):
            whole = network(pad([extended(start, ids[row].tolist(), 1)], 0)).hidden[0, -9:]
            torch.testing.assert_close(filled[row], whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("sizes", [{}, {"norm": "layer", "activation": "gelu", "positions": "learned"}])
@pytest.mark.parametrize("side", [None, 8])
def test_a_network_in_bf16_fills_in_what_it_fills_in_fp32(sizes: dict[str, Any], side: int | None) -> None:
    """As a GPU's does, whose weights are not packed."""
    network = model(picture_side=side, picture_tile=(2, 4), **sizes)
    count = 64 if side else 9
    ids = torch.randint(4, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(1))
    found = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            network.to(dtype)  # type: ignore[arg-type]
            _, cache = prefill(network, pad([prompt(7), prompt(4, 1)], 0), 80)
            filled = fill(network, ids, cache, count)
            stepped = torch.stack([step(network, ids[:, n], cache, n, count) for n in range(count)], 1)
            found[dtype] = torch.cat((filled, stepped), 1)
    assert found[torch.bfloat16].dtype == torch.bfloat16
    wrong = found[torch.bfloat16].float() - found[torch.float32]
    assert wrong.norm() < 0.05 * found[torch.float32].norm()


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("read", SOURCE_BLOCKS)
def test_one_after_the_other_is_what_it_says(guidance: float, read: str) -> None:
    network, given, free = model(), prompt(6, read=read), prompt(4, 1, read)
    found = draw(network, [given], [free], CODES, Drawing(passes=0, temperature=0, guidance=guidance)).codes[0].tolist()
    ids: list[int] = []
    with torch.inference_mode():
        for place in range(CODES.count):
            whole = [*ids, *[0] * (CODES.count - place)]  # what comes later is not seen
            rows = [network(pad([extended(s, whole, CAUSAL)], 0)).hidden[0, len(s) + place - 1] for s in (given, free)]
            told, other = (network.logits(row)[CODES.start : CODES.start + CODES.number] for row in rows)
            ids.append(int((told + guidance * (told - other)).argmax()) + CODES.start)
    assert [CODES.start + code for code in found] == ids


def test_one_pass_takes_the_likeliest_of_all_codes_at_once() -> None:
    network, given = model(), prompt(6)
    found = draw(network, [given], [], CODES, Drawing(passes=1, temperature=0)).codes
    with torch.inference_mode():
        hidden = network(pad([extended(given, [CODES.mask_id] * 9, 1)], 0)).hidden[:, -9:]
        logits = network.logits(hidden)[..., CODES.start : CODES.start + CODES.number]
    assert torch.equal(found, logits.argmax(-1))


def test_each_pass_keeps_the_surest_by_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    network, asked = model(), []

    def spy(model: Any, ids: torch.Tensor, cache: Any, codes: int) -> torch.Tensor:
        asked.append(ids.clone())
        return fill(model, ids, cache, codes)

    monkeypatch.setattr("openm6.inference.draw.fill", spy)
    found = draw(network, [prompt(6)], [], CODES, Drawing(passes=4, temperature=0, noise=0)).codes
    asked = asked[:-1]  # the last one is for the estimates
    still_open = [int((ids == CODES.mask_id).sum()) for ids in asked]
    assert still_open == [9, *(int(np.cos(np.pi / 2 * n / 4) * 9) for n in (1, 2, 3))]
    for before, after in itertools.pairwise(asked):  # what is decided stays
        decided = before != CODES.mask_id
        assert torch.equal(after[decided], before[decided])
    last = asked[-1] != CODES.mask_id
    assert torch.equal(found[last[0:1]] + CODES.start, asked[-1][last])


@pytest.mark.parametrize("passes", [0, 5])
def test_kept_codes_are_kept_and_seeds_and_company_change_nothing_else(passes: int) -> None:
    network, prompts = model(), [prompt(6), prompt(9, 1), prompt(4, 2)]
    options = Drawing(passes=passes, guidance=1.0, seed=5)
    free = [prompt(3, 9)] * 3
    kept = torch.full((3, 9), OPEN)
    kept[1, 2:6] = torch.tensor([7, 0, 19, 3])
    found = draw(network, prompts, free, CODES, options, kept).codes
    assert found.shape == (3, 9)
    assert ((found >= 0) & (found < 20)).all()
    assert found[1, 2:6].tolist() == [7, 0, 19, 3]
    assert torch.equal(found, draw(network, prompts, free, CODES, options, kept).codes)
    alone = draw(network, prompts[1:2], free[:1], CODES, options, kept[1:2], seeds=[6]).codes
    assert torch.equal(alone[0], found[1])
    other = draw(network, prompts, free, CODES, Drawing(passes=passes, guidance=1.0, seed=6), kept).codes
    assert not torch.equal(other, found)
    everything = draw(network, prompts, free, CODES, options, found).codes
    assert torch.equal(everything, found)


def whole_estimates(network: M6, given: Sequence, codes: torch.Tensor) -> torch.Tensor:
    """By a forward pass over everything, [3]."""
    ids = [*(CODES.start + codes).tolist(), *CODES.estimates]
    logits = network.logits(network(pad([extended(given, ids, 1)], 0)).hidden[0, -3:])
    return logits[:, CODES.yes_id] - logits[:, CODES.no_id]


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
@torch.inference_mode()
def test_estimates_are_those_of_a_whole_forward_pass(passes: int, guidance: float) -> None:
    network, prompts = model(), [prompt(6), prompt(9, 1)]
    drawn = draw(network, prompts, [prompt(3, 9)] * 2, CODES, Drawing(passes=passes, guidance=guidance))
    again = estimate(network, prompts, drawn.codes, CODES)
    for row, given in enumerate(prompts):
        wanted = whole_estimates(network, given, drawn.codes[row])
        torch.testing.assert_close(drawn.estimates[row], wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(again.estimates[row], wanted, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_progressive_drawing_is_what_it_says() -> None:
    """Against its definition, row by row: branches from one picture, the best goes on, its least sure are drawn again,
    and from the half on it ends when a pass gives nothing better."""
    network, given = model(), prompt(6)
    options = Drawing(passes=6, branches=3, temperature=1.0, noise=2.0, seed=4)
    kept = torch.full((1, 9), OPEN)
    kept[0, 2:4] = torch.tensor([7, 3])
    drawn = draw(network, [given], [], CODES, options, kept)
    chances = [torch.Generator().manual_seed(hash((4, 0, branch)) & 0x7FFFFFFF) for branch in range(3)]
    picture, sure = kept[0].tolist(), [0.0] * 9
    best: tuple[float, list[int]] = (-np.inf, [])
    for number in range(1, 7):
        tried = []
        for chance in chances:
            ids = [CODES.mask_id if code == OPEN else CODES.start + code for code in picture]
            hidden = network(pad([extended(given, ids, 1)], 0)).hidden[0, -9:]
            shares = network.logits(hidden)[:, CODES.start : CODES.start + CODES.number].softmax(-1)
            codes = sample(shares.log(), torch.rand(9, generator=chance)).tolist()
            noise = -(-torch.rand(9, generator=chance).clamp(1e-9, 1 - 1e-7).log()).log() * 2.0 * (1 - number / 6)
            new = [codes[i] if picture[i] == OPEN else picture[i] for i in range(9)]
            now = [float(shares[i, codes[i]].log() + noise[i]) if picture[i] == OPEN else sure[i] for i in range(9)]
            score = sum(torch.nn.functional.logsigmoid(whole_estimates(network, given, torch.tensor(new)))[:2]).item()
            tried.append((score, new, now))
        chosen = max(tried, key=lambda one: one[0])
        if number > 3 and chosen[0] <= best[0]:
            break
        best = chosen[:2]
        picture, sure = list(chosen[1]), [np.inf if kept[0, i] != OPEN else chosen[2][i] for i in range(9)]
        again = int(np.floor(np.cos(np.pi / 2 * number / 6) * 7 + 1e-6))
        for place in np.argsort(sure)[:again]:
            picture[place] = OPEN
    assert drawn.codes[0].tolist() == best[1]
    assert drawn.score(options)[0].item() == pytest.approx(best[0], abs=1e-3)
    assert drawn.codes[0, 2:4].tolist() == [7, 3]


def test_progressive_drawing_of_a_row_depends_on_that_row_alone() -> None:
    network, prompts = model(), [prompt(6), prompt(9, 1), prompt(4, 2)]
    options = Drawing(passes=5, branches=2, guidance=1.0)
    free = [prompt(3, 9)] * 3
    together = draw(network, prompts, free, CODES, options)
    assert together.codes.shape == (3, 9)
    for row in range(3):
        alone = draw(network, prompts[row : row + 1], free[:1], CODES, options, seeds=[row])
        assert torch.equal(alone.codes[0], together.codes[row])


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="passes is -1; it has to be between 0 and 1000"):
        Drawing.of(passes=-1)
    with pytest.raises(UsageError, match='Drawing has no option pases. Did you mean "passes"'):
        Drawing.of(pases=3)
    with pytest.raises(UsageError, match="branches are drawn in passes"):
        Drawing(passes=0, branches=2)
    with pytest.raises(UsageError, match="more than the model's 256 positions"):
        draw(model(positions="learned"), [prompt(250)], [], CODES)
