"""The mask of rows that hold the codes of a long picture: block-sparse among the codes, whole for all else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.model.sparse import SparsePattern, flex_attend, sparse_attend


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
