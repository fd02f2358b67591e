"""What an ONNX file costs, counted on the file itself (FACTS F).

Enters: the bytes of any ONNX classifier. Leaves: a `CostCard`. Nothing is executed; shapes are
inferred for one image.

- **MACs**: multiply-accumulates of convolutions and matrix products. Other operators count 0,
  except those known to hide products (`_OPAQUE`, foreign domains): they appear in `layers` with
  `macs: None`, as do those whose shapes cannot be inferred, and the total is then a lower bound.
- **params**: elements of the weights and biases of those operators as the operator sees them
  (after Cast, DequantizeLinear, a table: packing does not change the count), plus per-channel
  scales and shifts that an integer layer carries outside its operator. Not counted: per-tensor
  scales, zero points, tables, shapes, masks.
- **nonzeros**: those of them that are not zero; a quantised weight equal to its zero point is 0.
- **BOPs**: MACs x weight bits x activation bits. Executed: 8 x 8 for integer operators and for
  those between DequantizeLinear and QuantizeLinear, which onnxruntime fuses, 32 x 32 for float
  ones. Nominal: from the file's metadata `nominal_bits`, else as executed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx

from export.graph import NOMINAL_BITS, Array
from export.onnx_reader import Graph
from harness.records import CostCard, HarnessError

_FLOAT_BITS, _INTEGER_BITS = 32, 8
_BYTES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


@dataclass(frozen=True)
class _Operator:
    """Where an operator keeps its operands: input indices, None when it has no such input."""

    macs: Callable[[Graph, onnx.NodeProto, int], int]
    bits: int
    weight: int
    bias: int | None = None
    scale: int | None = None
    zero_point: int | None = None


def _conv_macs(graph: Graph, node: onnx.NodeProto, weight: int) -> int:
    output, kernel = graph.shape(node.output[0]), graph.shape(node.input[weight])
    return prod(output) * prod(kernel[1:])


def _gemm_macs(graph: Graph, node: onnx.NodeProto, weight: int) -> int:
    factor = graph.shape(node.input[weight])
    columns = factor[0 if graph.attribute(node, "transB", 0) else 1]
    return prod(graph.shape(node.input[0])) * columns


def _matmul_macs(graph: Graph, node: onnx.NodeProto, _weight: int) -> int:
    return prod(graph.shape(node.output[0])) * graph.shape(node.input[0])[-1]


_COUNTED = {
    "Conv": _Operator(_conv_macs, _FLOAT_BITS, weight=1, bias=2),
    "FusedConv": _Operator(_conv_macs, _FLOAT_BITS, weight=1, bias=2),
    "ConvInteger": _Operator(_conv_macs, _INTEGER_BITS, weight=1, zero_point=3),
    "QLinearConv": _Operator(_conv_macs, _INTEGER_BITS, weight=3, bias=8, scale=4, zero_point=5),
    "Gemm": _Operator(_gemm_macs, _FLOAT_BITS, weight=1, bias=2),
    "QGemm": _Operator(_gemm_macs, _INTEGER_BITS, weight=3, bias=6, scale=4, zero_point=5),
    "MatMul": _Operator(_matmul_macs, _FLOAT_BITS, weight=1),
    "MatMulInteger": _Operator(_matmul_macs, _INTEGER_BITS, weight=1, zero_point=3),
    "QLinearMatMul": _Operator(_matmul_macs, _INTEGER_BITS, weight=3, scale=4, zero_point=5),
}
_OPAQUE = frozenset(
    (
        "ConvTranspose",
        "DeformConv",
        "Einsum",
        "Attention",
        "LSTM",
        "GRU",
        "RNN",
        "If",
        "Loop",
        "Scan",
    )
)
_EPILOGUE = frozenset(("Cast", "Round", "Mul", "Add", "Reshape", "Transpose"))
"""What may stand between an operator without a bias input and the constants that rescale it."""


def cost_card(model_bytes: bytes, *, image_shape: tuple[int, int, int]) -> CostCard:
    """Count one ONNX file; `image_shape` is (C, H, W).

    Raises:
        HarnessError: not an ONNX model, not a model of one image input, weights outside the file,
            or shapes that contradict each other.
    """
    graph = Graph.parse(model_bytes, image_shape=image_shape)
    nominal = _nominal_bits(graph)
    layers = tuple(_layers(graph, nominal))
    counted = [layer for layer in layers if layer["macs"] is not None]
    return CostCard(
        file_bytes=len(model_bytes),
        gzip_bytes=len(gzip.compress(model_bytes, compresslevel=6, mtime=0)),
        params=sum(layer.get("params", 0) for layer in layers),
        nonzeros=sum(layer.get("nonzeros", 0) for layer in layers),
        macs=sum(layer["macs"] for layer in counted),
        bops_nominal=sum(layer["macs"] * prod(layer["bits_nominal"]) for layer in counted),
        bops_executed=sum(layer["macs"] * prod(layer["bits_executed"]) for layer in counted),
        opset=graph.opset,
        layers=layers,
    )


def uncounted_operators(card: CostCard) -> tuple[str, ...]:
    """Operators of the file whose MACs could not be counted; empty when the total is complete."""
    return tuple(sorted({layer["op"] for layer in card.layers if layer["macs"] is None}))


def _layers(graph: Graph, nominal: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for node in graph.nodes:
        operator = _COUNTED.get(node.op_type)
        if operator is None:
            if node.op_type in _OPAQUE or node.domain not in ("", "ai.onnx"):
                yield {"name": node.name, "op": node.op_type, "macs": None}
            continue
        params = nonzeros = 0
        for name, zero_point in _parameters(graph, node, operator):
            if name in seen:  # a tensor that two layers share is stored, and counted, once
                continue
            seen.add(name)
            value = graph.value(name)
            if value is not None:
                params += value.size
                nonzeros += int(np.count_nonzero(value != zero_point))
        bits = _INTEGER_BITS if _is_fused(graph, node) else operator.bits
        executed = [bits, bits]
        output = graph.shape_or_none(node.output[0])
        inputs = [graph.shape_or_none(entry) for entry in node.input if entry]
        known = output is not None and None not in inputs
        yield {
            "name": node.name,
            "op": node.op_type,
            "macs": operator.macs(graph, node, operator.weight) if known else None,
            "params": params,
            "nonzeros": nonzeros,
            "bits_executed": executed,
            "bits_nominal": nominal.get(node.name, executed),
            "output": None if output is None else list(output),
        }


def _is_fused(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether onnxruntime makes one integer operator of a float one and the nodes around it.

    It does where both operands are dequantised from 8 bits and the result is quantised again; a
    Gemm or MatMul may also leave it as float.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return False
    for name in node.input[:2]:
        source = graph.producer(name)
        if source is None or source.op_type != "DequantizeLinear":
            return False
        if graph.element_type(source.input[0]) not in _BYTES:
            return False
    consumer = graph.only_consumer(node.output[0])
    requantised = consumer is not None and consumer.op_type == "QuantizeLinear"
    return requantised or node.op_type != "Conv"


def _parameters(
    graph: Graph, node: onnx.NodeProto, operator: _Operator
) -> Iterator[tuple[str, Array | int]]:
    """(tensor name, the value that means zero) of everything learned in one layer."""
    zero_point = graph.value(graph.input(node, operator.zero_point))
    weight = graph.input(node, operator.weight)
    if zero_point is not None and zero_point.size > 1:
        zero_point = zero_point.reshape(-1, *[1] * (len(graph.shape(weight)) - 1))
    yield weight, 0 if zero_point is None else zero_point
    for index in (operator.bias, operator.scale):
        name = graph.input(node, index)
        if name and prod(graph.shape(name)) > 1:
            yield name, 0
    if graph.input(node, operator.bias) == "":
        yield from ((name, 0) for name in _epilogue_constants(graph, node))


def _epilogue_constants(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Per-channel constants multiplied into or added to an operator's output, if nothing else is.

    That is where the scale and shift of a ConvInteger live, and the bias of a MatMul.
    """
    output = node.output[0]
    while (consumer := graph.only_consumer(output)) is not None:
        if consumer.op_type not in _EPILOGUE:
            return
        if consumer.op_type in ("Mul", "Add"):
            other = next((name for name in consumer.input if name != output), output)
            value = graph.value(other)
            if value is None:
                return
            if value.size > 1:
                yield other
        output = consumer.output[0]


def _nominal_bits(graph: Graph) -> dict[str, list[int]]:
    text = graph.metadata.get(NOMINAL_BITS)
    if text is None:
        return {}
    try:
        return {str(name): [int(w), int(a)] for name, (w, a) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise HarnessError(
            f"metadata {NOMINAL_BITS!r} of the ONNX file is not "
            f"{{node: [weight bits, activation bits]}}: {error}"
        ) from error
