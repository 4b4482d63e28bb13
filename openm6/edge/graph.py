"""The network as ONNX graphs: in plain operations, for export, and with its weights in few bits.

The exported network computes one sequence, its prompt or its next position, with the keys and values of the positions
before. Legend, as in model/attention.py, beside it: N positions of this call, S positions before them, L layers, P
patches.

    ids        int64 [N]
    features   fp32 [P, D], places int64 [P]: what stands in the place of pictures' patches
    positions  int64 [N]
    mask       fp32 [N, S + N], 0 or -inf
    past       fp32 [S, L, 2, K, E]: keys and values; a position's lie together, so that more of them are a longer array

It returns the last position's logits [V] and state [D], the outputs of the heads on it, and the keys and values of this
call's positions, [N, L, 2, K, E].

Bits of a quantized graph (the numbers are those of model/lowbit.py: a scale for each output):

    8    products by MatMulInteger, their inputs rounded as they come (ONNX Runtime fuses both); rows of an embedding,
         and convolutions, are converted to fp32 as they are read
    4    products inside the layers by ONNX Runtime's MatMulNBits; the others in 8
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.errors import UsageError
from openm6.model import M6, lowbit
from openm6.model.attention import Attention
from openm6.model.block import Block
from openm6.model.feed_forward import FeedForward, activate
from openm6.model.norm import RMSNorm
from openm6.model.rotary import rotary_angles, rotate

INPUTS = ("ids", "features", "places", "positions", "mask", "past")
HEAD = "head_DV"
"""The output matrix, which is the embedding too: with 4 bits for its product it would be stored twice."""
SMALL = 512
"""Number of values up to which a tensor is not quantized."""


class Graph(nn.Module):
    """Raises UsageError for a network with experts: each would need a graph of its own."""

    def __init__(self, model: M6):
        super().__init__()
        if model.config.num_experts:
            raise UsageError(
                "This model has experts, which an ONNX bundle cannot have: distil it into a dense one first "
                "(openm6 finetune --teacher)."
            )
        self.model, self.config = model, model.config
        # Inputs first, as ONNX multiplies; a tied head is the embedding itself.
        self.head_DV = nn.Parameter(model.head_weight.detach().T.contiguous())
        # Layers may share a block.
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
            qkv, out, up, down = products
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
        """The attention output [N, H E], and the keys and values of this call, [N, 2, K, E]. `past`: [S, 2, K, E]."""
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


class ImageEncoder(nn.Module):
    """The image encoder: uint8 [H, W, 3] to features [P, D]."""

    def __init__(self, model: M6):
        super().__init__()
        assert model.image is not None
        self.image = model.image

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.image(pixels[None])
        return found


def examples(model: M6) -> tuple[Tensor, ...]:
    """Example inputs of the graph, whose sizes all differ."""
    config = model.config
    now, before, patches = 11, 5, 3
    past = torch.randn(before, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    return (
        torch.arange(now), torch.randn(patches, config.hidden_size), torch.arange(patches),
        torch.arange(before, before + now), torch.zeros(now, before + now), past,
    )  # fmt: skip


def quantize_graph(file: Path, bits: int) -> None:
    """Quantize the weights of an exported graph in place."""
    import onnx

    model = onnx.load(file)
    if bits == 4:
        model = _in_four(model)
    _Quantizer(model.graph).run()
    onnx.save(model, file)


def _in_four(model: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    head = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] == HEAD]
    quantizer = MatMulNBitsQuantizer(model, block_size=lowbit.GROUP, is_symmetric=False, nodes_to_exclude=head)
    quantizer.process()
    return quantizer.model.model


class _Quantizer:
    """Quantization of a graph's weights to 8 bits."""

    def __init__(self, graph: Any):
        self.graph = graph
        self.weights = {one.name: one for one in graph.initializer}
        self.nodes: list[Any] = []
        self.inputs: dict[str, tuple[str, str, str]] = {}  # of products: their names, rounded

    def run(self) -> None:
        for node in self.graph.node:
            if node.op_type == "MatMul" and self._is_large(node.input[1], 2):
                self._product(node.input[0], node.input[1], node.output[0])
            elif node.op_type == "Gather" and self._is_large(node.input[0], 2):
                axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
                self._rows(node.input[0], node.input[1], node.output[0], axis)
            else:
                for place, name in enumerate(node.input):
                    if node.op_type == "Conv" and self._is_large(name, 4):
                        node.input[place] = self._add(
                            "DequantizeLinear", self._quantized(name, 0), f"{name}.fp32", axis=0
                        )
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        kept = [one for name, one in self.weights.items() if name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)

    def _is_large(self, name: str, dims: int) -> bool:
        weight = self.weights.get(name)
        return weight is not None and len(weight.dims) == dims and int(np.prod(weight.dims)) >= SMALL

    def _quantized(self, name: str, axis: int) -> tuple[str, str]:
        """Names of the int8 weights and of their scales along the axis, which are a column for the rows of a matrix."""
        from onnx import numpy_helper

        numbers, scale = f"{name}.int8", f"{name}.scale"
        if numbers not in self.weights:
            weight = torch.from_numpy(numpy_helper.to_array(self.weights[name]).copy())
            found, scales = lowbit.round8(weight.movedim(axis, 0).contiguous())
            scales = scales[:, None] if axis == 0 and weight.ndim == 2 else scales
            self.weights[numbers] = numpy_helper.from_array(found.movedim(0, axis).contiguous().numpy(), numbers)
            self.weights[scale] = numpy_helper.from_array(scales.numpy(), scale)
        return numbers, scale

    def _product(self, given: str, weight: str, out: str) -> None:
        """x W, W [K, N] with a scale for each column."""
        numbers, scale = self._quantized(weight, 1)
        if given not in self.inputs:  # of several products once
            self.inputs[given] = (f"{given}.uint8", f"{given}.step", f"{given}.zero")
            self._add("DynamicQuantizeLinear", [given], *self.inputs[given])
        rounded, step, zero = self.inputs[given]
        product = self._add("MatMulInteger", [rounded, numbers, zero], f"{out}.int32")
        product = self._add("Cast", [product], f"{out}.float", to=1)
        self._add("Mul", [product, self._add("Mul", [step, scale], f"{out}.steps")], out)

    def _rows(self, weight: str, ids: str, out: str, axis: int) -> None:
        """Rows of the embedding: those of its matrix, or columns of the output matrix [K, N]."""
        numbers, scale = self._quantized(weight, axis)
        rows = self._add("Gather", [numbers, ids], f"{out}.int8", axis=axis)
        rows = self._add("Cast", [rows], f"{out}.float", to=1)
        self._add("Mul", [rows, self._add("Gather", [scale, ids], f"{out}.steps", axis=0)], out)

    def _add(self, operation: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operation, inputs, outputs, **attributes))
        return outputs[0]
