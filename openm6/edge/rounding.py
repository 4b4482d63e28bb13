"""A graph's weights in few bits.

8    products by MatMulInteger, their inputs rounded as they come (ONNX Runtime makes one operation of it); rows of an
     embedding, and convolutions, are brought back to fp32 as they are read
4    products inside the layers by ONNX Runtime's MatMulNBits; what is left in 8

The numbers are those of model/lowbit.py: a scale for each output.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openm6.model import lowbit

HEAD = "head_DV"
"""The output matrix, which is the embedding too (graph.py): with 4 bits for its product it would be stored twice."""
SMALL = 512
"""Numbers of a tensor that is left as it is."""


def round_graph(file: Path, bits: int) -> None:
    """In place."""
    import onnx

    model = onnx.load(file)
    if bits == 4:
        model = _in_four(model)
    _Rounding(model.graph).run()
    onnx.save(model, file)


def _in_four(model: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    head = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] == HEAD]
    quantizer = MatMulNBitsQuantizer(model, block_size=lowbit.GROUP, is_symmetric=False, nodes_to_exclude=head)
    quantizer.process()
    return quantizer.model.model


class _Rounding:
    def __init__(self, graph: Any):
        self.graph = graph
        self.weights = {one.name: one for one in graph.initializer}
        self.nodes: list[Any] = []
        self.inputs: dict[str, tuple[str, str, str]] = {}

    def run(self) -> None:
        from onnx import helper

        for node in self.graph.node:
            if node.op_type == "MatMul" and self._rounds(node.input[1], 2):
                self._product(helper, node)
            elif node.op_type == "Gather" and self._rounds(node.input[0], 2):
                self._rows(helper, node)
            else:
                for place, name in enumerate(node.input):
                    if node.op_type == "Conv" and self._rounds(name, 4):
                        node.input[place] = self._restored(helper, name)
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        kept = [one for name, one in self.weights.items() if name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)

    def _rounds(self, name: str, dims: int) -> bool:
        weight = self.weights.get(name)
        return weight is not None and len(weight.dims) == dims and int(np.prod(weight.dims)) >= SMALL

    def _rounded(self, name: str, axis: int) -> tuple[str, str]:
        """Names of the numbers and of the scales, one for each place on the axis."""
        from onnx import numpy_helper

        numbers, scale = f"{name}.int8", f"{name}.scale"
        if numbers not in self.weights:
            weight = torch.from_numpy(numpy_helper.to_array(self.weights[name]).copy())
            found, scales = lowbit.round8(weight.movedim(axis, 0).contiguous())
            whole = found.movedim(0, axis).contiguous().numpy()
            self.weights[numbers] = numpy_helper.from_array(whole, numbers)
            self.weights[scale] = numpy_helper.from_array(scales.numpy(), scale)
        return numbers, scale

    def _product(self, helper: Any, node: Any) -> None:
        """x W, W [K, N] with a scale a column."""
        given, (weight, scale), out = node.input[0], self._rounded(node.input[1], 1), node.output[0]
        if given not in self.inputs:  # of several products once
            self.inputs[given] = (f"{given}.uint8", f"{given}.step", f"{given}.zero")
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [given], self.inputs[given]))
        numbers, step, zero = self.inputs[given]
        self.nodes += [
            helper.make_node("MatMulInteger", [numbers, weight, zero], [f"{out}.int32"]),
            helper.make_node("Cast", [f"{out}.int32"], [f"{out}.float"], to=1),
            helper.make_node("Mul", [step, scale], [f"{out}.steps"]),
            helper.make_node("Mul", [f"{out}.float", f"{out}.steps"], [out]),
        ]

    def _rows(self, helper: Any, node: Any) -> None:
        """Columns of W [K, N], which are rows of the embedding."""
        axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
        (weight, scale), ids, out = self._rounded(node.input[0], axis), node.input[1], node.output[0]
        self.nodes += [
            helper.make_node("Gather", [weight, ids], [f"{out}.int8"], axis=axis),
            helper.make_node("Cast", [f"{out}.int8"], [f"{out}.float"], to=1),
            helper.make_node("Gather", [scale, ids], [f"{out}.steps"], axis=0),
        ]
        steps = f"{out}.steps"
        if axis == 0:
            axes = self._constant(f"{out}.axes", np.array([1], np.int64))
            self.nodes.append(helper.make_node("Unsqueeze", [steps, axes], [f"{steps}.column"]))
            steps = f"{steps}.column"
        self.nodes.append(helper.make_node("Mul", [f"{out}.float", steps], [out]))

    def _restored(self, helper: Any, name: str) -> str:
        """A convolution's weights, with a scale for each channel that comes out."""
        numbers, scale = self._rounded(name, 0)
        whole = f"{name}.restored"
        self.nodes.append(helper.make_node("DequantizeLinear", [numbers, scale], [whole], axis=0))
        return whole

    def _constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.weights[name] = numpy_helper.from_array(value, name)
        return name
