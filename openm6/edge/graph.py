"""The network in plain operations, for export: one sequence, its prompt or its next position, with what was kept of the
positions before.

Legend, as in model/attention.py, beside it: N positions of this call, S positions before them, L layers, P patches.

    ids        int64 [N]
    features   fp32 [P, D], places int64 [P]: what stands in the place of pictures' patches
    positions  int64 [N]
    mask       fp32 [N, S + N], 0 or -inf
    past       fp32 [S, L, 2, K, E]: keys and values; a position's lie together, so that more of them are a longer array

gives the last position's logits [V] and state [D], what heads say of it, and these positions' own keys and values,
[N, L, 2, K, E].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.errors import UsageError
from openm6.model import M6
from openm6.model.attention import Attention, rotary_angles, rotate
from openm6.model.block import Block
from openm6.model.feed_forward import FeedForward, activate
from openm6.model.norm import RMSNorm

INPUTS = ("ids", "features", "places", "positions", "mask", "past")


class Graph(nn.Module):
    """Raises UsageError for a network with experts: each would need a graph of its own."""

    def __init__(self, model: M6):
        super().__init__()
        if model.config.num_experts:
            raise UsageError(
                "This model has experts, which a package has not: teach a dense one first (openm6 finetune --teacher)."
            )
        self.model, self.config = model, model.config
        # Inputs first, as ONNX multiplies; a tied head is the embedding itself.
        self.head_DV = nn.Parameter(model.head_weight.detach().T.contiguous())
        every = {id(block): nn.ModuleList(map(_Product, _linears(block))) for block in model.layers()}
        self.products = nn.ModuleList(every[id(block)] for block in model.layers())

    def forward(
        self, ids: Tensor, features: Tensor, places: Tensor, positions: Tensor, mask: Tensor, past: Tensor
    ) -> tuple[Tensor, ...]:
        model, config = self.model, self.config
        x_ND = self.head_DV.index_select(1, ids).T if model.head is None else model.embed.weight[ids]
        x_ND = x_ND.index_copy(0, places, features)
        if model.place is not None:
            x_ND = x_ND + model.place.weight[positions]
        rope = rotary_angles(config, positions[None], torch.float32)
        kept = []
        products: Any
        for layer, (block, products) in enumerate(zip(model.layers(), self.products, strict=True)):
            assert isinstance(block.feed_forward, FeedForward)
            qkv, out, up, down = list(products)
            y_NE = qkv(_norm(block.attention_norm, x_ND))
            mixed_ND, own = self._attend(block.attention, y_NE, rope, mask, past[:, layer])
            kept.append(own)
            x_ND = x_ND + out(mixed_ND)
            x_ND = x_ND + down(activate(up(_norm(block.feed_forward_norm, x_ND)), block.feed_forward.gated))
        last_1D = _norm(model.norm, x_ND[-1:])
        heads = [F.linear(last_1D[0], head.weight, head.bias) for head in model.heads.values()]  # type: ignore[arg-type]
        return (last_1D @ self.head_DV)[0], last_1D[0], torch.stack(kept, 1), *heads

    def _attend(
        self, attention: Attention, qkv: Tensor, rope: Any, mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values mixed, [N, H E], and these positions' keys and values, [N, 2, K, E]; `past` [S, 2, K, E]."""
        heads, keys, width = attention.heads, attention.kv_heads, attention.width
        qkv = qkv.view(-1, heads + 2 * keys, width)
        qk, v_NKE = qkv[:, :-keys], qkv[:, -keys:]
        if attention.q_norm is not None:
            qk = _scaled(qk, attention.head_scale(), attention.q_norm.eps)
        if rope is not None:
            qk = rotate(qk[None], rope)[0]
        own_N2KE = torch.stack((qk[:, heads:], v_NKE), 1)
        k_SKE, v_SKE = torch.cat((past, own_N2KE)).unbind(1)
        # Queries by the keys that they share: [K, H / K, N, E].
        q_KHNE = qk[:, :heads].unflatten(1, (keys, -1)).permute(1, 2, 0, 3) * width**-0.5
        p_KHNS = (q_KHNE @ k_SKE.permute(1, 2, 0)[:, None] + mask).softmax(-1)
        y_KHNE = p_KHNS @ v_SKE.transpose(0, 1)[:, None]
        return y_KHNE.permute(2, 0, 1, 3).flatten(1), own_N2KE


def _linears(block: Block) -> tuple[nn.Linear, ...]:
    assert isinstance(block.feed_forward, FeedForward)
    return block.attention.qkv, block.attention.out, block.feed_forward.up, block.feed_forward.down


class _Product(nn.Module):
    """x W + b, W [in, out]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, RMSNorm):
        return _scaled(x, norm.weight, norm.eps)
    y: Tensor = norm(x)
    return y


def _scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in operations that any exporter knows."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Eyes(nn.Module):
    """Of pictures: uint8 [H, W, 3] to features [P, D]."""

    def __init__(self, model: M6):
        super().__init__()
        assert model.image is not None
        self.image = model.image

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.image(pixels[None])
        return found


def examples(model: M6) -> tuple[Tensor, ...]:
    """Inputs of the graph, of sizes that are all different."""
    config = model.config
    now, before, patches = 11, 5, 3
    past = torch.randn(before, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    return (
        torch.arange(now), torch.randn(patches, config.hidden_size), torch.arange(patches),
        torch.arange(before, before + now), torch.zeros(now, before + now), past,
    )  # fmt: skip
