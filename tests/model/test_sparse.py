"""Block-sparse attention: its pattern, and every means of it against dense masked attention in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import openm6.model.sparse as sparse
from openm6.core.errors import UsageError
from openm6.model.sparse import SparsePattern, block_mask, flex_attend, seen_codes, sparse_attend


@st.composite
def patterns(draw: st.DrawFn) -> SparsePattern:
    """Pictures of up to 5 x 5 tiles, some too small for anything to be left out."""
    side = draw(st.sampled_from((4, 6, 8, 10)))
    lengths = st.sampled_from([length for length in (1, 2, 3, 4, 5) if side % length == 0])
    return SparsePattern(side, (draw(lengths), draw(lengths)), draw(st.booleans()))


def naive_mask(pattern: SparsePattern) -> Tensor:
    """The pattern, bool [N, N], written out from its definition: same tile row, same tile column, tiles that touch
    (at corners too), and nothing later if causal."""
    height, width = pattern.tile
    where = [(code // pattern.side // height, code % pattern.side // width) for code in range(pattern.side**2)]
    touching = {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    mask = torch.zeros(len(where), len(where), dtype=torch.bool)
    for query, (row, column) in enumerate(where):
        for key, (other_row, other_column) in enumerate(where):
            near = (other_row - row, other_column - column) in touching
            seen = near or row == other_row or column == other_column
            mask[query, key] = seen and not (pattern.causal and key > query)
    return mask


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor, mask: Tensor, text_mask: Tensor | None
) -> Tensor:
    """Dense, key heads repeated, text before codes."""
    repeat = q.shape[1] // k.shape[1]
    keys = torch.cat((k_text, k), 2).repeat_interleave(repeat, 1)
    values = torch.cat((v_text, v), 2).repeat_interleave(repeat, 1)
    if text_mask is None:
        text_mask = torch.ones(len(q), k_text.shape[2], dtype=torch.bool)
    text = text_mask[:, None, None].expand(-1, 1, q.shape[2], -1)
    scores = q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5
    seen = torch.cat((text, mask.expand(len(q), 1, -1, -1)), 3)
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ values


def inputs(pattern: SparsePattern, rows: int, heads: int, kv_heads: int, length: int, width: int = 4) -> list[Tensor]:
    shapes = [(heads, pattern.codes), *[(kv_heads, pattern.codes)] * 2, *[(kv_heads, length)] * 2]
    return [torch.randn(rows, *shape, width, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same_with_gradients(one: Tensor, other: Tensor, tensors: list[Tensor]) -> None:
    torch.testing.assert_close(one, other)
    weights = torch.randn_like(one)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), tensors) for y in (one, other))
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.slow
@given(patterns())
def test_the_rule_is_row_column_and_neighbourhood(pattern: SparsePattern) -> None:
    numbers = torch.arange(pattern.codes)
    mask = pattern.allowed(numbers[:, None], numbers)
    assert torch.equal(mask, naive_mask(pattern))
    assert pattern.allowed(3, 7) == mask[3, 7]


@given(patterns())
def test_orders_are_each_others_way_back(pattern: SparsePattern) -> None:
    order = pattern.tile_order()
    assert torch.equal(order.sort().values, torch.arange(pattern.codes))
    x = torch.randn(2, 3, pattern.codes, 4)
    assert torch.equal(pattern.to_tiles(x).flatten(2, 3), x[..., order, :])
    assert torch.equal(pattern.to_rows(pattern.to_tiles(x)), x)
    # A tile is a rectangle of codes that lie together.
    grid = torch.stack((order // pattern.side, order % pattern.side), 1).view(pattern.tiles, pattern.area, 2)
    spread = grid.amax(1) - grid.amin(1) + 1
    assert torch.equal(spread, torch.tensor(pattern.tile).expand_as(spread))


@pytest.mark.slow
@given(patterns())
def test_neighbours_are_the_tiles_of_which_any_code_is_seen(pattern: SparsePattern) -> None:
    order, shape = pattern.tile_order(), (pattern.tiles, pattern.area, pattern.tiles, pattern.area)
    seen = naive_mask(pattern)[order][:, order].view(shape).any(3).any(1)
    table, real = pattern.neighbours()
    for tile in range(pattern.tiles):
        assert table[tile, real[tile]].tolist() == seen[tile].nonzero()[:, 0].tolist()
    assert pattern.kept_share == pytest.approx(float(seen.float().mean()))


def test_a_fifth_is_kept_at_side_64() -> None:
    assert 0.15 < SparsePattern(64).kept_share < 0.21
    assert SparsePattern(64, causal=True).kept_share < 0.14


def test_a_side_that_tiles_do_not_fill_is_named() -> None:
    with pytest.raises(UsageError, match=r"Tiles of 4 x 8 codes do not fill a picture of 12 x 12"):
        SparsePattern(12)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    patterns(), st.integers(1, 2), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(0, 9), st.booleans(),
    st.integers(1, 9),
)  # fmt: skip
def test_gathered_blocks_are_dense_masked_attention(
    pattern: SparsePattern, rows: int, heads: tuple[int, int], length: int, masked: bool, products: int
) -> None:
    tensors = inputs(pattern, rows, *heads, length)
    text_mask = torch.rand(rows, length) < 0.5 if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "PRODUCTS", products)  # however the work is cut
        mine = sparse_attend(*tensors, pattern, text_mask)
        assert_same_with_gradients(mine, naive_attention(*tensors, naive_mask(pattern), text_mask), tensors)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_differences(causal: bool) -> None:
    pattern = SparsePattern(4, (2, 1), causal)
    tensors = inputs(pattern, 1, 2, 1, 3, width=2)
    text_mask = torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda *t: sparse_attend(*t, pattern, text_mask), tensors)


def test_a_picture_without_gaps_is_sdpa() -> None:
    pattern = SparsePattern(8)  # two tiles, one above the other
    q, k, v, k_text, v_text = inputs(pattern, 2, 4, 4, 5)
    dense = torch.nn.functional.scaled_dot_product_attention(q, torch.cat((k_text, k), 2), torch.cat((v_text, v), 2))
    torch.testing.assert_close(sparse_attend(q, k, v, k_text, v_text, pattern), dense)


def test_bf16_is_near_fp32() -> None:
    pattern = SparsePattern(16, causal=True)
    tensors = [t.detach().float() for t in inputs(pattern, 1, 2, 2, 6, width=16)]
    low = sparse_attend(*(t.bfloat16() for t in tensors), pattern)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), sparse_attend(*tensors, pattern), atol=0.05, rtol=0.05)


def test_autocast_leaves_the_precision_of_what_is_given() -> None:
    pattern = SparsePattern(8, (2, 4))
    tensors = [t.detach().float().requires_grad_() for t in inputs(pattern, 1, 2, 2, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        mine = sparse_attend(*tensors, pattern)
        grads = torch.autograd.grad(mine.sum(), tensors)
    assert mine.dtype == torch.float32
    for left, right in zip(grads, torch.autograd.grad(sparse_attend(*tensors, pattern).sum(), tensors), strict=True):
        assert torch.equal(left, right)


@settings(max_examples=15)
@given(patterns(), st.integers(0, 7), st.booleans())
def test_block_mask_is_the_rule_in_tile_order(pattern: SparsePattern, length: int, masked: bool) -> None:
    text_mask = torch.rand(2, length) < 0.5 if masked and length else None
    mask = block_mask(pattern, length, text_mask)
    order, before = pattern.tile_order(), length + -length % pattern.area
    numbers = torch.arange(before + pattern.codes)
    zero = torch.tensor(0)
    for row in range(1 if text_mask is None else 2):
        seen = mask.mask_mod(torch.tensor(row), zero, numbers[: pattern.codes, None], numbers)
        text = torch.ones(length, dtype=torch.bool) if text_mask is None else text_mask[row]
        assert torch.equal(
            seen[:, :before], torch.cat((text, torch.zeros(before - length).bool())).expand_as(seen[:, :before])
        )
        assert torch.equal(seen[:, before:], naive_mask(pattern)[order][:, order])
    # What is skipped is what the table leaves out.
    table, real = pattern.neighbours()
    blocks = mask.to_dense()[0, 0, :, before // pattern.area :].bool()
    assert [b.nonzero()[:, 0].tolist() for b in blocks] == [t[r].tolist() for t, r in zip(table, real, strict=True)]


@pytest.mark.slow
@settings(max_examples=10)
@given(patterns(), st.integers(0, 7), st.booleans())
def test_flex_attention_is_dense_masked_attention(pattern: SparsePattern, length: int, masked: bool) -> None:
    tensors = [t.detach() for t in inputs(pattern, 2, 4, 2, length)]
    text_mask = torch.rand(2, length) < 0.5 if masked and length else None
    mine = flex_attend(*tensors, pattern, block_mask(pattern, length, text_mask), compiled=False)
    torch.testing.assert_close(mine, naive_attention(*tensors, naive_mask(pattern), text_mask))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_compiled_flex_attention_is_dense_masked_attention(device: str, causal: bool) -> None:
    pattern = SparsePattern(16, causal=causal)
    tensors = [t.detach().float().to(device).requires_grad_(device == "cuda") for t in inputs(pattern, 2, 2, 2, 40, 32)]
    text_mask = torch.rand(2, 40) < 0.5
    mine = flex_attend(*tensors, pattern, block_mask(pattern, 40, text_mask.to(device), device))
    double = [t.detach().double().cpu().requires_grad_() for t in tensors]
    dense = naive_attention(*double, naive_mask(pattern), text_mask)
    torch.testing.assert_close(mine.cpu().double(), dense, atol=1e-4, rtol=1e-4)
    if device == "cuda":
        for left, right in zip(
            *(torch.autograd.grad(y.square().sum(), t) for y, t in ((mine, tensors), (dense, double))), strict=True
        ):
            torch.testing.assert_close(left.cpu().double(), right, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@given(patterns())
def test_steps_read_what_the_causal_rule_allows(pattern: SparsePattern) -> None:
    mask = naive_mask(SparsePattern(pattern.side, pattern.tile, causal=True))
    seen = seen_codes(SparsePattern(pattern.side, pattern.tile, causal=True))
    assert len(seen) == pattern.codes
    for code, codes in enumerate(seen):
        assert codes.tolist() == [*(key for key in range(code) if mask[code, key]), code]


def test_one_by_one_is_causal_attention() -> None:
    pattern = SparsePattern(8, (2, 2), causal=True)
    q, k, v, k_text, v_text = (t.detach() for t in inputs(pattern, 2, 3, 3, 5))
    whole = sparse_attend(q, k, v, k_text, v_text, pattern)
    keys, values = torch.cat((k_text, k), 2), torch.cat((v_text, v), 2)
    for code in range(pattern.codes):
        places = torch.cat((torch.arange(5), seen_codes(pattern)[code] + 5))
        step = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, code : code + 1], keys.index_select(2, places), values.index_select(2, places)
        )
        torch.testing.assert_close(step[:, :, 0], whole[:, :, code])
