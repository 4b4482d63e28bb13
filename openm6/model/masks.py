"""The one mask rule (core/batch.py) in the forms that attention takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.core.batch import Batch, allowed
from openm6.core.errors import OpenM6Error
from openm6.core.sequence import CAUSAL
from openm6.model import cpu
from openm6.model.config import ModelConfig
from openm6.model.cpu.attention import additive, dense_mask
from openm6.model.sparse import SparsePattern, block_mask, flex_attend, sparse_attend


def build_mask(segments_BT: Tensor, blocks_BT: Tensor, dtype: torch.dtype, flex: bool | None = None) -> Any:
    """The mask of a batch, in the form of the attention that will use it, made once a forward.

    On a GPU (or with `flex`): FlexAttention's BlockMask, which skips the blocks in which nothing is allowed.
    On a CPU: a DenseMask of its kernels, or an additive tensor [B, 1, T, T] without them.
    """
    if flex if flex is not None else segments_BT.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            together = (blocks_BT[b, q] == blocks_BT[b, k]) & (blocks_BT[b, q] >= 0)
            return (segments_BT[b, q] == segments_BT[b, k]) & ((k <= q) | together)

        rows, length = segments_BT.shape
        return create_block_mask(rule, rows, None, length, length, device=segments_BT.device)
    seen_BTS = allowed(segments_BT, blocks_BT)
    return dense_mask(seen_BTS, dtype) if cpu.takes(seen_BTS) else additive(seen_BTS[:, None], dtype)


@dataclass(frozen=True, slots=True)
class PictureMask:
    """The mask of rows that each hold a picture's codes in the same columns: `before` keys, the codes, and a tail.

    bias        0 / -inf for the queries that are no codes, [B, 1, those, S]: the ones before and after them
    queries     how many of those stand before the codes
    seen        which keys before and after the codes these see, bool [B, before + tail]
    blocks      FlexAttention's BlockMask in the place of gathered blocks
    """

    pattern: SparsePattern
    before: int
    queries: int
    bias: Tensor
    seen: Tensor
    blocks: Any = None

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """softmax(q k / sqrt(E) + mask) v, [B, H, T, E]."""
        count = self.pattern.codes
        codes, columns = slice(self.queries, self.queries + count), slice(self.before, self.before + count)
        k_text, v_text = (torch.cat((x[:, :, : columns.start], x[:, :, columns.stop :]), 2) for x in (k_BKSE, v_BKSE))
        own = q_BHTE[:, :, codes], k_BKSE[:, :, columns], v_BKSE[:, :, columns], k_text, v_text
        if self.blocks is None:
            y_codes = sparse_attend(*own, self.pattern, self.seen)
        else:
            y_codes = flex_attend(*own, self.pattern, self.blocks)
        if self.bias.shape[2] == 0:
            return y_codes
        others = torch.cat((q_BHTE[:, :, : codes.start], q_BHTE[:, :, codes.stop :]), 2)
        grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
        y_others = F.scaled_dot_product_attention(others, k_BKSE, v_BKSE, attn_mask=self.bias, enable_gqa=grouped)
        return torch.cat((y_others[:, :, : codes.start], y_codes, y_others[:, :, codes.start :]), 2)


def batch_mask(config: ModelConfig, batch: Batch, dtype: torch.dtype) -> Any:
    """The mask of a batch: block-sparse where its rows hold the codes of drawn images and the model has
    `picture_side`."""
    if batch.codes is not None and config.picture_side:
        return build_picture_mask(config, batch, dtype)
    return build_mask(batch.segments, batch.blocks, dtype)


def build_picture_mask(config: ModelConfig, batch: Batch, dtype: torch.dtype) -> PictureMask:
    """The mask of a batch whose rows hold the codes of a drawn picture in the same columns (`pad_drawn`), all by masks
    or all one after the other."""
    assert batch.codes is not None
    device, columns = batch.ids.device, torch.arange(batch.ids.shape[1], device=batch.ids.device)
    inside = (columns >= batch.codes.start) & (columns < batch.codes.stop)
    segments, blocks = batch.segments, batch.blocks
    others = columns[~inside]
    together = (blocks[:, others, None] == blocks[:, None]) & (blocks[:, others, None] >= 0)
    seen = (segments[:, others, None] == segments[:, None]) & ((columns <= others[:, None]) | together)
    one_by_one = bool(blocks[0, batch.codes.start] == CAUSAL)
    pattern = SparsePattern.of(config, one_by_one)
    if pattern.codes != len(batch.codes):
        raise OpenM6Error(f"A picture of {len(batch.codes)} codes; model.picture_side makes them {pattern.codes}.")
    # The text, and what follows the codes where they see each other both ways.
    before = batch.codes.start
    told = (segments[:, others] > 0) & ((others < before) | (not one_by_one))
    mask = block_mask(pattern, len(others), told, device) if device.type == "cuda" else None
    return PictureMask(pattern, before, before, additive(seen[:, None], dtype), told, mask)
